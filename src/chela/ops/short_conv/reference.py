"""Short depthwise convolution in plain torch: the sum over taps that defines it, and the form that runs.

Shapes: B batch, T time, D channels, W taps. `padded` is the input with `left` rows in front (the state, or zeros)
and W-1-left zero rows behind, so that `out_t = bias + sum_j weight[:, j] padded_{t + j}`.
"""

import functools

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from chela.ops.documents import each_document
from chela.ops.precision import wide_dtype


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    causal: bool,
    activation: str | None,
    state: Tensor | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Run the convolution; arguments as in `chela.ops.short_conv`, already checked."""
    width = weight.shape[1]
    if not causal:
        left = (width - 1) // 2
        return _run(F.pad(x, (0, 0, left, width - 1 - left)), weight, bias, activation), None

    def run(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        padded = F.pad(x, (0, 0, width - 1, 0)) if state is None else torch.cat([state, x], dim=1)
        return _run(padded, weight, bias, activation), padded[:, x.shape[1] :].clone()

    if cu_seqlens is not None:
        out, state = each_document(run, (x,), cu_seqlens, state)
    else:
        out, state = run(x, state)
    return out, state if return_state else None


def short_conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, state: Tensor, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Take one token; arguments as in `chela.ops.short_conv_step`, already checked."""
    window = torch.cat([state, x.unsqueeze(1)], dim=1)  # [B, W, D]
    return _run(window, weight, bias, activation).squeeze(1), window[:, 1:].clone()


def taps(
    padded: Float[Tensor, "b t_plus_w_minus_1 d"], weight: Float[Tensor, "d w"], bias: Float[Tensor, " d"] | None
) -> Float[Tensor, "b t d"]:
    """The definition: shifted inputs times taps."""
    width = weight.shape[1]
    length = padded.shape[1] - (width - 1)
    shifted = (weight[:, j] * padded[:, j : j + length] for j in range(width))
    out = functools.reduce(torch.add, shifted)
    return out if bias is None else out + bias


def stepwise(
    padded: Float[Tensor, "b t_plus_w_minus_1 d"], weight: Float[Tensor, "d w"], bias: Float[Tensor, " d"] | None
) -> Float[Tensor, "b t d"]:
    """The definition, one step after the other.

    So are sums over time for the gradients, as in a library's convolution on some processors: what that may be off in
    float32, this is.
    """
    width = weight.shape[1]
    windows = (padded[:, t : t + width].mT for t in range(padded.shape[1] - (width - 1)))
    out = torch.stack([(weight * window).sum(2) for window in windows], dim=1)
    return out if bias is None else out + bias


def plain(
    padded: Float[Tensor, "b t_plus_w_minus_1 d"], weight: Float[Tensor, "d w"], bias: Float[Tensor, " d"] | None
) -> Float[Tensor, "b t d"]:
    """The form whose error says what an implementation may have (`chela.ops.testing`), in the dtype of `padded`.

    In float32 that is `stepwise`, since how a library sums there depends on the processor; elsewhere `taps`.
    """
    form = stepwise if padded.dtype == torch.float32 else taps
    return form(padded, weight.to(padded.dtype), None if bias is None else bias.to(padded.dtype))


def grouped(
    padded: Float[Tensor, "b t_plus_w_minus_1 d"], weight: Float[Tensor, "d w"], bias: Float[Tensor, " d"] | None
) -> Float[Tensor, "b t d"]:
    """The same through torch's grouped convolution, one group a channel.

    The input is shown as an image of height 1, whose layout [B, T, D] torch knows as `channels_last`: nothing is
    transposed in memory, which `conv1d` would do.
    """
    image = padded.mT.unsqueeze(2)  # [B, D, 1, T+W-1]
    return F.conv2d(image, weight[:, None, None], bias, groups=weight.shape[0]).squeeze(2).mT


def _run(padded: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    wide = wide_dtype(padded.dtype)
    form = grouped if padded.shape[1] >= weight.shape[1] else taps  # torch's convolution refuses to return no rows
    out = form(padded.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return (F.silu(out) if activation == "silu" else out).to(padded.dtype)
