"""Batch norm on Triton's kernels: their launch, their registration with torch, their derivative.

With xh = (x - mean) rstd, sums s = sum dy and w = sum dy xh over all rows, and n rows that count,

    dx = weight rstd (dy - (s + xh w) / n)          the bracket's last term where x counts,

and s and w are the gradients of bias and weight. A kernel makes the sums; dx is written in torch, for a compiler to
join with what else reaches x.
"""

from typing import Any

import torch
from torch import Tensor

from chela.ops import moment_kernels
from chela.ops.batch_norm import WIDEST, kernels
from chela.ops.launch import ceil, dense, grid, no_second_derivative, power
from chela.ops.moments import Moments

ENTRIES = 2048
"""Entries of a tile, 16 for each of a program's threads."""
TILES = 16
"""Such tiles that a program sums up."""
COLUMNS = 8
"""Channels whose moments one program merges."""
PARTS = 1024
"""Parts that it reads at a time."""


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, mask: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Moments]:
    """Run the kernels; arguments and result as `chela.ops.batch_norm`, already checked.

    Raises:
        ValueError: float64, or rows wider than the kernels take.
    """
    if x.dtype == torch.float64:
        raise ValueError("batch_norm's Triton kernels keep sums in float32: for float64 use impl='reference'")
    if x.shape[-1] > WIDEST:
        raise ValueError(
            f"batch_norm's Triton kernels take at most D = {WIDEST} and x has {x.shape[-1]}: use impl='reference'"
        )
    y, moments = torch.ops.chela.batch_norm.default(x, weight, bias, mask, eps, dtype)
    mean, variance, count = moments.detach().unbind()
    return y, Moments(mean, variance, count[0])


# Registered by schema, not by torch.library.custom_op: that loads the compiler when the op is first called.
_TAG = torch.Tag.pt2_compliant_tag
torch.library.define(
    "chela::batch_norm",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? mask, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    tags=_TAG,
)
torch.library.define("chela::batch_norm_sums", "(Tensor dy, Tensor x, Tensor moments, float eps) -> Tensor", tags=_TAG)


def _sizes(d: int) -> dict[str, int]:
    block = power(d)
    return {"D": d, "BM": max(1, min(ENTRIES // block, 64)), "BD": block}


@torch.library.impl("chela::batch_norm", "default")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    y, moments = _forward_shapes(x, weight, bias, mask, eps, dtype)
    if not x.numel():
        return y, moments.copy_(moments.new_tensor([0.0, 0.0, 1.0])[:, None])
    d = x.shape[-1]
    n, sizes = x.numel() // d, _sizes(d)
    programs = ceil(n, TILES * sizes["BM"])
    parts = moments.new_empty(programs, 3, d)
    with torch.cuda.device_of(x):
        x = x.contiguous()
        grid(kernels.moments_of_parts, programs)(
            parts, x, dense(mask), n, TILES=TILES, MASKED=mask is not None, **sizes
        )
        grid(moment_kernels.merge, ceil(d, COLUMNS))(
            moments, parts, programs, D=d, BLOCK=PARTS, COLUMNS=COLUMNS, num_warps=8
        )
        grid(kernels.normalise, ceil(n, sizes["BM"]))(
            y, x, moments, weight.contiguous(), bias.contiguous(), n, eps, **sizes
        )
    return y, moments


@torch.library.impl("chela::batch_norm_sums", "default")
def _sums(dy: Tensor, x: Tensor, moments: Tensor, eps: float) -> Tensor:
    """Sums over all rows of dy and of dy (x - mean) rstd, [2, D] float32."""
    d = x.shape[-1]
    if not x.numel():
        return moments.new_zeros(2, d)
    n, sizes = x.numel() // d, _sizes(d)
    programs = ceil(n, TILES * sizes["BM"])
    parts = moments.new_empty(programs, 2, d)
    with torch.cuda.device_of(x):
        grid(kernels.sums_of_parts, programs)(
            parts, dy.contiguous(), x.contiguous(), moments.contiguous(), n, eps, TILES=TILES, **sizes
        )
    return parts.sum(0)


@torch.library.register_fake("chela::batch_norm")
def _forward_shapes(
    x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(3, x.shape[-1], dtype=torch.float32)


@torch.library.register_fake("chela::batch_norm_sums")
def _sums_shape(dy: Tensor, x: Tensor, moments: Tensor, eps: float) -> Tensor:
    return moments.new_empty(2, x.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, mask, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight, output[1], mask)
    ctx.of_bias = bias.dtype


def _differentiate(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, moments, mask = ctx.saved_tensors
    mean, variance, count = moments.unbind()
    s, w = torch.ops.chela.batch_norm_sums.default(dy, x, moments, ctx.eps).unbind()
    rstd = torch.rsqrt(variance + ctx.eps)
    of_moments = (s + (x.float() - mean) * (rstd * w)) / count
    if mask is not None:
        of_moments = of_moments.masked_fill(~mask.unsqueeze(-1), 0)
    dx = (dy.float() - of_moments) * (weight.float() * rstd)
    return dx.to(x.dtype), w.to(weight.dtype), s.to(ctx.of_bias), None, None, None


torch.library.register_autograd("chela::batch_norm", _differentiate, setup_context=_save)
torch.library.register_autograd("chela::batch_norm_sums", no_second_derivative("batch_norm"))
