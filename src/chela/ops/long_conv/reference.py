"""Long depthwise convolution in plain torch: the sum over lags that defines it, and the Fourier form that runs.

Shapes: B batch, T time, D channels, L lags into the past, L2 lags into the future, S inputs carried in. `history` is
the state followed by the input, [B, S+T, D]; the last T positions are wanted.
"""

import functools

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from chela.ops.long_conv.fourier import fft_conv, plain_fft_conv
from chela.ops.long_conv.history import with_history, within_reach
from chela.ops.precision import wide_dtype
from chela.ops.short_conv import reference as short_conv

FEW_LAGS = 16
"""Up to so many lags the sum over lags is cheaper than Fourier transforms (forward and backward, on a CPU)."""


def long_conv(
    x: Tensor,
    kernel: Tensor,
    *,
    reverse_kernel: Tensor | None,
    state: Tensor | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Run the convolution; arguments as in `chela.ops.long_conv`, already checked."""
    return with_history(
        _convolve,
        x,
        kernel,
        reverse_kernel=reverse_kernel,
        state=state,
        return_state=return_state,
        cu_seqlens=cu_seqlens,
    )


def long_conv_step(x: Tensor, kernel: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
    """Take one token; arguments as in `chela.ops.long_conv_step`, already checked."""
    wide = wide_dtype(x.dtype)
    history = torch.cat([state, x.unsqueeze(1)], dim=1)  # [B, S+1, D]
    lags = history.shape[1]
    out = torch.einsum("bsd,ds->bd", history.to(wide), kernel[:, :lags].flip(1).to(wide))
    return out.to(x.dtype), history[:, max(0, lags - (kernel.shape[1] - 1)) :].clone()


def direct(
    history: Float[Tensor, "b s_plus_t d"], kernel: Float[Tensor, "d l"], reverse: Float[Tensor, "d l2"], length: int
) -> Float[Tensor, "b t d"]:
    """The definition: a sum over lags, O(T (L + L2))."""
    ahead, behind = reverse.shape[1], kernel.shape[1] - 1
    start = history.shape[1] - length
    padded = F.pad(history, (0, 0, behind, ahead))
    taps = [*zip(range(behind + 1), kernel.unbind(1), strict=True)]
    taps += [*zip(range(-1, -ahead - 1, -1), reverse.unbind(1), strict=True)]
    first = behind + start
    return functools.reduce(torch.add, (tap * padded[:, first - lag : first - lag + length] for lag, tap in taps))


def grouped(
    history: Float[Tensor, "b s_plus_t d"], kernel: Float[Tensor, "d l"], reverse: Float[Tensor, "d l2"], length: int
) -> Float[Tensor, "b t d"]:
    """The same sum through torch's grouped convolution, for few lags."""
    ahead, behind = reverse.shape[1], kernel.shape[1] - 1
    start = history.shape[1] - length
    padded = F.pad(history, (0, 0, behind - start, ahead))  # cuts off what is out of reach where start > behind
    return short_conv.grouped(padded, torch.cat([kernel.flip(1), reverse], dim=1), None)


def _convolve(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> Tensor:
    """Take the cheaper form; where a graph is exported, one of torch's own ops, for any length."""
    if torch.compiler.is_exporting():
        few = kernel.shape[1] + reverse.shape[1] <= FEW_LAGS or (isinstance(length, int) and length == 1)
        if not few:
            return plain_fft_conv(history, kernel, reverse, length)
    else:
        kernel, reverse = within_reach(history.shape[1], kernel, reverse, length)
        if kernel.shape[1] + reverse.shape[1] > FEW_LAGS:
            return fft_conv(history, kernel, reverse, length)
    wide = wide_dtype(history.dtype)
    return grouped(history.to(wide), kernel.to(wide), reverse.to(wide), length).to(history.dtype)
