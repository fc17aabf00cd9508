"""The long convolution token by token, exact, at a cost that hardly grows with the context: online convolution.

Outputs come one at a time, inputs are known up to now: what each finished block of inputs adds to the outputs ahead
is summed early, by Fourier transforms, and a token itself takes up to `block` lags directly. Time since the state was
made is cut into epochs of M tokens; t counts within one, from 0. Three parts make up an output:

    near    t - t mod R .. t    the block of R that is not finished yet: a plain dot product
    epoch   0 .. t - t mod R    when t reaches s, 3s, 5s, ... for s = R, 2R, 4R .. M/2, the last s inputs are
                                convolved with the first 2s taps and added to the next s outputs
    past    before the epoch    when the epoch begins, cut into blocks of 3M; all add to the M outputs in one
                                transform back

Every pair of an input and an output meets in one part exactly once (relaxed multiplication: van der Hoeven 2002;
for sequence models FlashInference, Oncescu et al. 2024, and the epochs of FutureFill, Agarwal et al. 2024; the cut of
the past is the partitioned convolution of audio). A token costs R + O(log^2 M) for the first two parts and
O((L/M) log M) for the third. M is L/32, so that all of it is O(log^2 L), and what must be kept besides the last L-1
inputs is small beside them: 2 M numbers a channel and row, and of the kernel the spectra of its first taps, 2 M
numbers a channel. Spectra of the whole kernel would take 4/3 of its memory, and reading them as long as reading the
taps: they are taken anew each epoch, a group of channels at a time that the cache can hold.

Only differences of time count. Rows may be at any position of their sequences and share one clock.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor
from torch.nn import functional as F

from chela.ops.long_conv.fourier import good_size, spectrum
from chela.ops.precision import wide_dtype

BLOCK = 64
"""R: inputs that a token sums directly, at most."""
LEAST_EPOCH, EPOCHS = 1024, 32
"""M is the power of two next to L / EPOCHS, but at least so long, if the kernel is."""
GROUP = 2**22
"""Points of a group of transforms over the past."""
CHANNELS = 32
"""Channels of a Triton program."""


@dataclass(eq=False, repr=False)
class OnlineState:
    """What the online convolution keeps; `long_conv_step` changes it in place. All but the last five have the batch.

    R is the block, M the epoch, both powers of two.
    """

    past: Float[Tensor, "b s d"]
    """Inputs before the epoch, as far as the kernel reaches, most recent last."""
    inputs: Float[Tensor, "b m d"]
    """Inputs of the epoch; from the clock on, anything finite."""
    pending: Float[Tensor, "b m d"]
    """What finished blocks add to the outputs of the epoch, in the dtype of the sums."""
    position: Int[Tensor, " b"]
    """The clock on the device: the same number in every row."""
    near: Float[Tensor, "r d"]
    """The kernel's taps of lags R-1 .. 0."""
    spectra: tuple[Complex[Tensor, "d f"], ...]
    """Of the kernel's first 2R, 4R .. M taps."""
    lags: int
    """L."""
    clock: int
    """t, inputs of the epoch so far: 0 .. M-1."""
    held: bool = False
    """A step leaves the clock where it is: `advance` is called by whoever replays the step as a CUDA graph."""

    @property
    def block(self) -> int:
        """R."""
        return self.near.shape[0]

    @property
    def epoch(self) -> int:
        """M."""
        return self.inputs.shape[1]

    def __repr__(self) -> str:
        (batch, epoch, channels), kind = self.inputs.shape, str(self.inputs.dtype).removeprefix("torch.")
        return (
            f"OnlineState(b={batch}, d={channels}, lags={self.lags}, clock={self.clock}, block={self.block}, "
            f"epoch={epoch}, {kind} on {self.inputs.device})"
        )

    def tensors(self) -> list[Tensor]:
        """What belongs to the rows: past, inputs, pending, position."""
        return [self.past, self.inputs, self.pending, self.position]

    def map(self, function: Callable[[Tensor], Tensor]) -> "OnlineState":
        """Apply `function` to what belongs to the rows; what belongs to the kernel follows to its device."""
        past, inputs, pending, position = (function(tensor) for tensor in self.tensors())
        near, *spectra = (tensor.to(past.device) for tensor in (self.near, *self.spectra))
        return replace(
            self, past=past, inputs=inputs, pending=pending, position=position, near=near, spectra=(*spectra,)
        )

    def last_inputs(self) -> Float[Tensor, "b s d"]:
        """The last inputs, at most L-1: the plain state of `long_conv`, which shares no memory with this one."""
        seen = torch.cat([self.past, self.inputs[:, : self.clock]], dim=1)
        return seen[:, max(0, seen.shape[1] - self.lags + 1) :].clone()


def long_conv_online_state(
    inputs: Float[Tensor, "b s d"],
    kernel: Float[Tensor, "d l"],
    *,
    clock: int = 0,
    block: int = BLOCK,
    epoch: int | None = None,
) -> OnlineState:
    """Make ready for many steps after `inputs`: the state of `long_conv`, for a `long_conv_step` that costs O(log^2 L).

    It costs about what reading the inputs cost, O(S log S). The kernel must stay as it is and be passed to every
    step. Rows of a batch may be at any position: before a row's first input put zeros.

    Args:
        inputs: the last S inputs, most recent last [B, S, D], S >= 0; more than L-1 are not needed.
        kernel: taps over lags 0..L-1 [D, L].
        clock: inputs that count as read within the present epoch, 0 to M-1. A state made with the clock of another
            can join its batch (`join`).
        block: R, inputs that a token sums directly, at most: a power of two.
        epoch: M, outputs that are prepared at once: a power of two, at least R; None takes L/32, from 1,024 up.

    Raises:
        ValueError: shapes do not fit, or block, epoch or clock is out of range.
    """
    if kernel.dim() != 2 or kernel.shape[1] < 1:
        raise ValueError(f"kernel must be [D, L], L >= 1; got {list(kernel.shape)}")
    if inputs.dim() != 3 or inputs.shape[2] != kernel.shape[0]:
        raise ValueError(f"inputs must be [B, S, D] with D = {kernel.shape[0]}; got {list(inputs.shape)}")
    epoch = max(block, epoch_length(kernel.shape[1])) if epoch is None else epoch
    if block < 1 or epoch < block or block & (block - 1) or epoch & (epoch - 1):
        raise ValueError(f"block and epoch must be powers of two, block <= epoch; got {block} and {epoch}")
    if not 0 <= clock < epoch:
        raise ValueError(f"clock must lie within an epoch, 0 to {epoch - 1}; got {clock}")
    with torch.no_grad():
        wide, (rows, carried, channels), lags = wide_dtype(inputs.dtype), inputs.shape, kernel.shape[1]
        before = max(0, carried - clock)
        near = F.pad(kernel[:, :block].to(wide), (0, max(0, block - lags))).flip(1).T.contiguous()
        sizes = [block << n for n in range(1, (epoch // block).bit_length())]  # 2R .. M
        state = OnlineState(
            past=inputs[:, max(0, before - lags + 1) : before],
            inputs=inputs.new_zeros(rows, epoch, channels),
            pending=inputs.new_zeros(rows, epoch, channels, dtype=wide),
            position=torch.full((rows,), clock, device=inputs.device),
            near=near,
            spectra=tuple(torch.fft.rfft(kernel[:, :size].to(wide), size) for size in sizes),
            lags=lags,
            clock=clock,
        )
        state.inputs[:, clock - carried + before : clock] = inputs[:, before:]
        _read_past(state, kernel)
        for t in range(block, clock + 1, block):
            _finish_block(state, t)
    return state


def epoch_length(lags: int) -> int:
    """M for a kernel of L taps."""
    return 1 << (min(max(LEAST_EPOCH, -(-lags // EPOCHS)), lags) - 1).bit_length()


def join(states: list[OnlineState]) -> OnlineState:
    """One batch of the rows of several states with the same kernel and clock.

    Raises:
        ValueError: their clocks, blocks, epochs or kernel lengths differ.
    """
    first = states[0]
    kinds = [(s.clock, s.block, s.epoch, s.lags) for s in states]
    if len({*kinds}) > 1:
        raise ValueError(f"states of one batch share clock, block, epoch and kernel length; got {kinds}")
    longest = max(s.past.shape[1] for s in states)
    rows = [(F.pad(s.past, (0, 0, longest - s.past.shape[1], 0)), *s.tensors()[1:]) for s in states]
    past, inputs, pending, position = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return replace(first, past=past, inputs=inputs, pending=pending, position=position)


def emit(x: Float[Tensor, "b d"], state: OnlineState, *, triton: bool) -> Float[Tensor, "b d"]:
    """Take an input into the state and give its output; `advance` must follow.

    With Triton two launches whatever the clock, which they read on the device, as all of a held state's operations do:
    a CUDA graph can hold them.
    """
    if triton:
        out = _launch(x.contiguous(), state)
    elif state.held:
        t, lags = state.position[:1], torch.arange(state.block, device=x.device)
        state.inputs.index_copy_(1, t, x.to(state.inputs.dtype).unsqueeze(1))
        window = state.inputs[:, (t - lags).clamp(min=0)].to(state.near.dtype)
        window = window * (lags <= t % state.block).unsqueeze(1)  # what is older is in `pending`
        out = (window * state.near.flip(0)).sum(1).add_(state.pending[:, t].squeeze(1)).to(x.dtype)
    else:
        t = state.clock
        state.inputs[:, t] = x
        first = t - t % state.block
        window = state.inputs[:, first : t + 1].to(state.near.dtype)
        out = (window * state.near[first - t - 1 :]).sum(1).add_(state.pending[:, t]).to(x.dtype)
    state.position += 1
    return out


def advance(state: OnlineState, kernel: Float[Tensor, "d l"]) -> None:
    """Move the clock behind an input; where a block or an epoch ends, sum what it adds to the outputs ahead."""
    state.clock += 1
    if state.clock == state.epoch:
        seen = state.past.shape[1] + state.epoch
        drop = max(0, seen - state.lags + 1)
        state.past = torch.cat([state.past[:, drop:], state.inputs[:, max(0, drop - state.past.shape[1]) :]], dim=1)
        state.clock = 0
        state.position.zero_()
        _read_past(state, kernel)
    elif state.clock % state.block == 0:
        _finish_block(state, state.clock)


def _launch(x: Tensor, state: OnlineState) -> Tensor:
    from chela.ops.long_conv.online_kernels import step

    rows, channels = x.shape
    out = x.new_empty(rows, channels)
    if out.numel():
        step[(-(-channels // CHANNELS), rows)](
            x, state.inputs, state.pending, state.near, state.position, out, state.epoch, channels,
            BLOCK=state.block, CHANNELS=CHANNELS, num_warps=4,
        )  # fmt: skip
    return out


def _finish_block(state: OnlineState, t: int) -> None:
    """Add the last s inputs before t to the s outputs from t on; s is the largest power of two that divides t."""
    s = t & -t
    kernel = state.spectra[(s // state.block).bit_length() - 1]  # of 2s taps
    product = spectrum(state.inputs[:, t - s : t], 0, 2 * s)
    product *= kernel
    state.pending[:, t : t + s] += torch.fft.irfft(product, 2 * s)[..., s:].mT


def _read_past(state: OnlineState, kernel: Tensor) -> None:
    """Set `pending` to what the past adds to the outputs of the epoch.

    A block of P inputs that ends c P inputs before the epoch meets taps c P + 1 .. c P + P + M - 1. In transforms of
    at least P + M points over it and over the taps from c P on, its part of the outputs stands at P .. P + M - 1,
    where nothing wraps.
    """
    past, pending, epoch = state.past, state.pending, state.epoch
    (rows, length, channels), wide = past.shape, pending.dtype
    if not past.numel():
        pending.zero_()
        return
    block = min(3 * epoch, length)
    points = good_size(block + epoch)
    group = max(1, GROUP // (rows * points))
    for begin in range(0, channels, group):
        of = slice(begin, begin + group)
        total = None
        for ends in range(0, length, block):  # how far before the epoch
            stop = length - ends
            x = past[:, max(0, stop - block) : stop, of]
            product = spectrum(x, block - x.shape[1], points)
            taps = torch.fft.rfft(kernel[of, ends : ends + block + epoch].to(wide), points)
            product *= taps
            total = product if total is None else total.add_(product)  # addcmul_ would be compiled first, for seconds
        assert total is not None
        pending[..., of] = torch.fft.irfft(total, points)[..., block : block + epoch].mT
