"""Long depthwise convolution: a kernel as long as the sequence, one a channel."""

from typing import overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chela.ops.checks import check_alike, check_causal_only, check_documents, check_shape
from chela.ops.impl import Impl, resolve
from chela.ops.long_conv import fused, online, reference
from chela.ops.long_conv.online import OnlineState
from chela.ops.long_conv.online import long_conv_online_state as long_conv_online_state
from chela.ops.precision import no_autocast


def long_conv(
    x: Float[Tensor, "b t d"],
    kernel: Float[Tensor, "d l"],
    *,
    reverse_kernel: Float[Tensor, "d l2"] | None = None,
    causal: bool = True,
    state: Float[Tensor, "n s d"] | None = None,
    return_state: bool = False,
    cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "n s_after d"] | None]:
    """Convolve each channel with its own kernel over lags: `out_t = sum_{l >= 0} kernel[:, l] x_{t-l}`.

    With a reverse kernel, `sum_{l >= 1} reverse_kernel[:, l-1] x_{t+l}` is added. The convolution is linear, never
    circular: beyond the ends x is zero. Lags that reach beyond both x and the state are ignored, so a kernel may be
    longer or shorter than T.

    Precision: the reference, and any implementation of float32 and float64, sums and transforms in float32 (float64
    for float64). In 16 bits Triton has two kinds of methods. Toeplitz tiles multiply numbers in the input's dtype,
    the taps rounded to it, and the past does not feel the future by a bit. Transforms on the matrix units divide each
    row of time, [T] of a channel, by a power of two and multiply in float16: the relative error of output and
    gradients is at most 0.006 in bfloat16, most of it the rounding of the result, and 0.002 in float16. Any
    transform's rounding is relative to the largest entry of a row, so in the causal form the past can feel the
    future. On the matrix units, whatever comes later moves an output by at most 2^-9 max_t |x_t| max_w |K_w|, apart
    from the rounding of the output itself; K_w is the kernel's frequency response, never larger than
    sum_l |kernel_l|. The bound is tested, not proven. Rows whose largest entry is below 1e-30 lose precision there.

    A NaN or an infinity makes all of its row NaN where a transform runs, the past too (in a kernel, all of its
    channel); other channels and other rows of the batch stay as they are. A sum over lags spreads it to what sees it.

    Args:
        x: input [B, T, D].
        kernel: taps over lags 0..L-1 into the past [D, L], L >= 1; any floating dtype no wider than the sums'.
        reverse_kernel: taps over lags 1..L2 into the future [D, L2], likewise; only with `causal=False`. None has no
            future part, also with `causal=False`.
        causal: past and present only.
        state: the last S inputs before x, most recent last [B, S, D] in x's dtype; any S from 0 to L-1, fewer than
            L-1 meaning that nothing came before them. Packed: [N, S, D].
        return_state: also return the last min(S + T, L-1) inputs.
        cu_seqlens: int32 [N+1], ends of N documents packed along T with B = 1: starts at 0, never decreases, may
            repeat (empty documents), ends at T. A document's numbers never depend on its neighbours.
        impl: "auto", "triton" or "reference". Triton takes 16-bit inputs by Toeplitz tiles where outputs see up to one
            or a few thousand lags, and packed ones; up to 2^20 inputs by transforms on the matrix units; all else by
            torch's transforms between fused passes (`chela.ops.long_conv.method`). Where it keeps spectra for the
            backward pass (16 bits, from 8,193 inputs on, kernels of three quarters of them), no second derivative.

    Returns:
        Output [B, T, D] in x's dtype, and the state [B, min(S + T, L-1), D] (packed: [N, L-1, D], with zeros in
        front where fewer inputs came), or None.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; state or cu_seqlens without `causal=True`; reverse_kernel
            with it; the implementation cannot run here. The contents of cu_seqlens are checked on the CPU only.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, D]; got {list(x.shape)}")
    _check_kernel("kernel", kernel, x, least=1)
    check_causal_only(causal, state, return_state, cu_seqlens)
    if reverse_kernel is not None:
        if causal:
            raise ValueError("reverse_kernel looks into the future: it needs causal=False")
        _check_kernel("reverse_kernel", reverse_kernel, x, least=0)
    if cu_seqlens is not None:
        check_documents(cu_seqlens, x)
    if state is not None:
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _check_state(state, rows, x, kernel, "[B, S, D]" if cu_seqlens is None else "[N, S, D]")
    check_alike({"x": x}, {"kernel": kernel, "reverse_kernel": reverse_kernel})
    implementation = fused if resolve(impl, x.device, "long_conv") == "triton" else reference
    with no_autocast(x.device):
        return implementation.long_conv(
            x, kernel, reverse_kernel=reverse_kernel, state=state, return_state=return_state, cu_seqlens=cu_seqlens
        )


@overload
def long_conv_step(x: Tensor, kernel: Tensor, *, state: Tensor, impl: Impl = "auto") -> tuple[Tensor, Tensor]: ...


@overload
def long_conv_step(
    x: Tensor, kernel: Tensor, *, state: OnlineState, impl: Impl = "auto"
) -> tuple[Tensor, OnlineState]: ...


def long_conv_step(
    x: Float[Tensor, "b d"],
    kernel: Float[Tensor, "d l"],
    *,
    state: Float[Tensor, "b s d"] | OnlineState,
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b s_after d"] | OnlineState]:
    """Take one token of the causal convolution.

    With the plain state, the last inputs, it is a dot product over them, O(S), differentiable, and the state passed
    in is left as it was. With that of `long_conv_online_state` it costs O(log^2 L) a token on average: nearly all
    tokens sum at most 64 inputs; where a block or an epoch of inputs ends, transforms sum what it adds to the outputs
    ahead. That state is **changed in place** and returned, and carries no gradients.

    Args:
        x: input [B, D].
        kernel: taps over lags 0..L-1 [D, L]; with an online state, the same as it was made with.
        state: the last S inputs [B, S, D], S from 0 (before the first token) to L-1; or an online state.
        impl: as in `long_conv`. The plain step is the reference's everywhere.

    Returns:
        Output [B, D] in x's dtype and the new state: [B, min(S + 1, L-1), D], or the online one.

    Raises:
        ValueError: as in `long_conv`; a gradient is asked for with an online state.
    """
    if x.dim() != 2:
        raise ValueError(f"x must be [B, D]; got {list(x.shape)}")
    _check_kernel("kernel", kernel, x, least=1)
    check_alike({"x": x}, {"kernel": kernel})
    implementation = resolve(impl, x.device, "long_conv")
    with no_autocast(x.device):
        if isinstance(state, OnlineState):
            _check_online(state, x, kernel)
            out = online.emit(x, state, triton=implementation == "triton")
            if not state.held:
                online.advance(state, kernel)
            return out, state
        _check_state(state, x.shape[0], x, kernel, "[B, S, D]")
        return reference.long_conv_step(x, kernel, state=state)


def _check_kernel(name: str, kernel: Tensor, x: Tensor, least: int) -> None:
    channels = x.shape[-1]
    if kernel.dim() != 2 or kernel.shape[0] != channels or kernel.shape[1] < least:
        raise ValueError(f"{name} must be [D, L] with D = {channels}, L >= {least}; got {list(kernel.shape)}")


def _check_state(state: Tensor, rows: int, x: Tensor, kernel: Tensor, legend: str) -> None:
    if state.dim() != 3 or state.shape[1] > kernel.shape[1] - 1:
        reach = kernel.shape[1] - 1
        raise ValueError(f"state must be {legend} with S at most L-1 = {reach}; got {list(state.shape)}")
    check_shape("state", state, (rows, state.shape[1], x.shape[-1]), legend)
    check_alike({"x": x, "state": state}, {})


def _check_online(state: OnlineState, x: Tensor, kernel: Tensor) -> None:
    if torch.is_grad_enabled() and (x.requires_grad or kernel.requires_grad):
        raise ValueError("an online state carries no gradients: step under torch.no_grad() or torch.inference_mode()")
    if kernel.shape[1] != state.lags:
        raise ValueError(f"the online state was made with a kernel of {state.lags} taps; got {kernel.shape[1]}")
    check_shape("x", x, (state.past.shape[0], state.past.shape[2]), "[B, D] of the online state")
    check_alike({"x": x, "the online state": state.inputs}, {})
