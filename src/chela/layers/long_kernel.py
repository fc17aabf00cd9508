"""What the long convolution learns: kernel parameterisations, the parallel branches, and how they fold into one.

Lags count into the past: tap 0 is the current step. A bidirectional kernel has a second set of taps for lags
1, 2, ... into the future. Every convolution here is linear in its input, so a sum of branches is one kernel.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chela.layers.norms import BatchNorm
from chela.ops.precision import no_autocast

KernelKind = Literal["dense", "multiscale"]


LARGEST = 2**24
"""Numbers of a matrix that says which parameter holds at which lag; a larger one would take more than 64 MiB."""


class Taps(NamedTuple):
    """A depthwise convolution as its op takes it."""

    forward: Float[Tensor, "d l"]
    """Lags 0, 1, ... into the past."""
    reverse: Float[Tensor, "d l2"] | None
    """Lags 1, 2, ... into the future; None when causal."""
    bias: Float[Tensor, " d"] | None
    """Added to each channel."""


def time_scales(d_model: int, length: int) -> Float[Tensor, " d"]:
    """Decay times spread evenly in the logarithm from 1 to `length` steps over the channels."""
    return torch.logspace(0, math.log10(max(length, 2)), d_model)


class DenseKernel(nn.Module):
    """A free parameter for every lag, `[D, L]`.

    At the start the taps are white noise under an exponential envelope, one time scale a channel, scaled to unit
    energy, so that a white input keeps its variance (the decaying start of long convolutions: Fu et al. 2023).
    """

    def __init__(self, d_model: int, length: int) -> None:
        super().__init__()
        envelope = torch.exp(-torch.arange(length) / time_scales(d_model, length).unsqueeze(1))  # [D, L]
        self.taps = nn.Parameter(torch.randn(d_model, length) * envelope / envelope.norm(dim=1, keepdim=True))

    def forward(self) -> Float[Tensor, "d l"]:
        """The kernel, `[D, L]`."""
        return self.taps


class MultiscaleKernel(nn.Module):
    """Equally many parameters for every octave of lags: O(log L) a channel (after SGConv, Li et al. 2022).

    With m taps an octave, the lags [0, m) have one parameter each; the octave [m 2^(j-1), m 2^j) has m parameters,
    each held over 2^(j-1) neighbouring lags. Octave j is scaled by 2^(-j/2) times an envelope with one time scale a
    channel, so that at the start every octave within a channel's reach carries equal energy.
    """

    amplitude: Tensor
    """Of each octave [D, octaves]."""
    holds: Tensor | None
    """1 where a parameter is a lag's own, [octaves m, L]; None where it would be too large."""

    def __init__(self, d_model: int, length: int, taps_per_octave: int = 16) -> None:
        super().__init__()
        octaves = 1 + max(0, math.ceil(math.log2(length / taps_per_octave)))
        self.length = length
        self.taps = nn.Parameter(torch.randn(d_model, octaves, taps_per_octave))
        self.held = [1, *(2 ** (j - 1) for j in range(1, octaves))]  # lags each parameter of an octave is held for
        for name, table in self._tables().items():
            self.register_buffer(name, None if table is None else table.to(self.taps.device), persistent=False)
        self.register_load_state_dict_post_hook(_fill_tables)

    def _tables(self) -> dict[str, Tensor | None]:
        """`amplitude` and `holds`, from settings alone.

        On the CPU wherever the kernel is, also where its own memory is none or not yet written (`torch.device("meta")`,
        `to_empty`): the same numbers everywhere.
        """
        d_model, octaves, taps_per_octave = self.taps.shape
        with torch.device("cpu"):
            starts = torch.tensor([0, *(taps_per_octave * w for w in self.held[1:])])
            held = torch.tensor(self.held)
            amplitude = torch.exp(-starts / time_scales(d_model, self.length).unsqueeze(1)) * held**-0.5
            energy = (amplitude.square() * held * taps_per_octave).sum(1, keepdim=True)
            count, holds = octaves * taps_per_octave, None
            if count * self.length <= LARGEST:
                owner = torch.arange(count).repeat_interleave(held.repeat_interleave(taps_per_octave))[: self.length]
                holds = (owner == torch.arange(count).unsqueeze(1)).float()
        return {"amplitude": amplitude * energy.rsqrt(), "holds": holds}

    def forward(self) -> Float[Tensor, "d l"]:
        """The kernel, `[D, L]`."""
        scaled = self.taps * self.amplitude.unsqueeze(-1)  # [D, octaves, m]
        if self.holds is not None:  # one product instead of a sum for every octave in the backward pass
            with no_autocast(scaled.device):
                return scaled.flatten(1) @ self.holds
        octaves = [scaled[:, j, :, None].expand(-1, -1, n).flatten(1) for j, n in enumerate(self.held)]
        return torch.cat(octaves, dim=1)[:, : self.length]


class BranchedKernel(nn.Module):
    """One long branch and a few short ones, each with a learned scale per channel, summed into one kernel.

    With `branch_norm`, each branch's output also passes a batch norm of its own while training; with the running
    statistics of evaluation that is again a scale and a shift, so the branches still fold.

    Raises:
        ValueError: an unknown kind, or a number out of its range (names it).
    """

    def __init__(
        self,
        d_model: int,
        length: int,
        *,
        causal: bool,
        kind: KernelKind = "dense",
        taps_per_octave: int = 16,
        branches: tuple[int, ...] = (7, 31),
        branch_norm: bool = False,
        squash: float = 0.0,
        tap_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in get_args(KernelKind):
            raise ValueError(f"kernel must be {' or '.join(get_args(KernelKind))}; got {kind!r}")
        if taps_per_octave < 1:
            raise ValueError(f"taps_per_octave must be at least 1; got {taps_per_octave}")
        if not all(width >= 1 for width in branches):
            raise ValueError(f"branches must be positive widths; got {branches}")
        if squash < 0 or not 0 <= tap_dropout < 1:
            raise ValueError(
                f"squash must not be negative and tap_dropout lie in [0, 1); got {squash} and {tap_dropout}"
            )
        self.d_model, self.length, self.causal, self.squash = d_model, length, causal, squash
        self.tap_dropout = nn.Dropout(tap_dropout)
        directions = 1 if causal or length == 1 else 2

        def long_branch(n: int) -> nn.Module:
            return MultiscaleKernel(d_model, n, taps_per_octave) if kind == "multiscale" else DenseKernel(d_model, n)

        widths = [min(w, length) for w in branches]
        self.past = nn.ModuleList([long_branch(length), *(DenseKernel(d_model, w) for w in widths)])
        self.future = nn.ModuleList(
            [long_branch(length - 1), *(DenseKernel(d_model, max(1, w - 1)) for w in widths)] if directions == 2 else []
        )
        count = 1 + len(widths)
        self.scale = nn.Parameter(torch.full((count, d_model), (count * directions) ** -0.5))
        self.norms = nn.ModuleList([BatchNorm(d_model) for _ in range(count)]) if branch_norm else None

    def branch(self, index: int) -> Taps:
        """Taps of one branch with its scale (branch norm left out), cut to its own length."""

        def regularised(taps: Tensor) -> Tensor:
            if index > 0:
                return taps
            if self.squash > 0:
                taps = torch.sign(taps) * torch.relu(taps.abs() - self.squash)
            return self.tap_dropout(taps)

        scale = self.scale[index].unsqueeze(1)
        past = regularised(self.past[index]()) * scale
        future = regularised(self.future[index]()) * scale if len(self.future) else None
        return Taps(past, future, None)

    def forward(self) -> Taps:
        """All branches folded into one kernel `[D, L]` (and `[D, L-1]` backwards), with a bias under branch norm."""
        past = future = bias = None
        for index in range(len(self.past)):
            taps = self._normed(index) if self.norms is not None else self.branch(index)
            past = taps.forward if past is None else _add(past, taps.forward)
            if taps.reverse is not None:
                future = taps.reverse if future is None else _add(future, taps.reverse)
            if taps.bias is not None:
                bias = taps.bias if bias is None else bias + taps.bias
        assert past is not None
        return Taps(past, future, bias)

    def _normed(self, index: int) -> Taps:
        assert self.norms is not None
        norm, taps = self.norms[index], self.branch(index)
        assert isinstance(norm, BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        future = None if taps.reverse is None else taps.reverse * gain.unsqueeze(1)
        return Taps(taps.forward * gain.unsqueeze(1), future, norm.bias - gain * norm.running_mean)


class FoldedKernel(nn.Module):
    """A branched kernel after `merge()`: the taps themselves."""

    def __init__(self, taps: Taps) -> None:
        super().__init__()
        self.past = nn.Parameter(taps.forward.detach().clone())
        self.future = None if taps.reverse is None else nn.Parameter(taps.reverse.detach().clone())
        self.bias = None if taps.bias is None else nn.Parameter(taps.bias.detach().clone())

    def forward(self) -> Taps:
        """The folded taps."""
        return Taps(self.past, self.future, self.bias)


def _fill_tables(kernel: nn.Module, _: object) -> None:
    """Behind `load_state_dict`: weights come from a file, tables do not."""
    assert isinstance(kernel, MultiscaleKernel)
    for name, table in kernel._tables().items():
        if table is not None:
            place = getattr(kernel, name)
            if place.is_meta:
                setattr(kernel, name, table.to(kernel.taps.device, place.dtype))
            else:
                place.copy_(table)


def _add(long: Float[Tensor, "d l"], short: Float[Tensor, "d w"]) -> Float[Tensor, "d l"]:
    return long + nn.functional.pad(short, (0, long.shape[1] - short.shape[1]))
