"""Bidirectional linear attention as a registered op: a sum over all tokens, then a product for each token."""

from typing import Any

import torch
from torch import Tensor

from chela.ops.linear_attention import kernels_states
from chela.ops.linear_attention.launch import (
    define,
    dense,
    differentiable,
    keep_nothing,
    no_second_derivative,
    summed_states,
)
from chela.ops.linear_attention.plan import MOST_HELD, plans, product_plan

define("bidirectional", "(Tensor q, Tensor k, Tensor v, float scale, bool silu) -> (Tensor, Tensor)")
define(
    "bidirectional_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor total, float scale, bool silu) -> (Tensor, Tensor, Tensor)",
)


def attend_both_ways(q: Tensor, k: Tensor, v: Tensor, scale: float, silu: bool) -> Tensor:
    """Output [B, T, H, V], of silu(v) in v's place if asked for."""
    return torch.ops.chela.linear_attention_bidirectional.default(q, k, v, scale, silu)[0]


@torch.library.impl("chela::linear_attention_bidirectional", "default")
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, silu: bool) -> tuple[Tensor, Tensor]:
    """Output and the sum of all k v^T [B, H, K, V]."""
    return _applied(q, total := _total(k, v, silu=silu), scale, v.shape[3]), total


@torch.library.register_fake("chela::linear_attention_bidirectional")
def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, scale: float, silu: bool) -> tuple[Tensor, Tensor]:
    batch, _, heads, key = q.shape
    return v.new_empty(v.shape), q.new_empty(batch, heads, key, v.shape[3], dtype=torch.float32)


@torch.library.impl("chela::linear_attention_bidirectional_backward", "default")
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, total: Tensor, scale: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    over_scale = _total(q, grad)
    return (
        _applied(grad, total, scale, q.shape[3], transposed=True),
        _applied(v, over_scale, scale, k.shape[3], transposed=True, silu=silu),
        _applied(k, over_scale, scale, v.shape[3], slope_of=v if silu else None),
    )


@torch.library.register_fake("chela::linear_attention_bidirectional_backward")
def _backward_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, total: Tensor, scale: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _total(k: Tensor, v: Tensor, *, silu: bool = False) -> Tensor:
    """The sum over all tokens of k v^T [B, H, K, V], with silu(v) in v's place if asked for."""
    batch, length, heads, key = k.shape
    plan, _ = plans(batch * heads, length, key, v.shape[3], k.dtype, k.device)
    if not k.numel() or not v.numel():
        return k.new_zeros(batch, heads, key, v.shape[3], dtype=torch.float32)
    return summed_states(k, v, plan, None, None, whole=True, silu=silu).sum(2)


def _applied(
    q: Tensor,
    state: Tensor,
    scale: float,
    width: int,
    *,
    transposed: bool = False,
    silu: bool = False,
    slope_of: Tensor | None = None,
) -> Tensor:
    """The products scale * q S [B, T, H, width], with S or its transpose.

    Asked for, silu(q) takes q's place, or the result is multiplied by SiLU's derivative at `slope_of`.
    """
    batch, length, heads, key = q.shape
    out = q.new_empty(batch, length, heads, width)
    if not out.numel():
        return out
    (q, v), strides, align = dense(q, q if slope_of is None else slope_of)
    plan = product_plan(batch * heads, length, key, width, q.dtype, q.device)
    kernels_states.times_state[(batch * heads * plan.programs(width), plan.splits)](
        q, v, state, out, scale, length, heads, plan.unit, *strides,
        K=key, V=width, BK=plan.key_tile, BV=plan.value_tile, C=plan.chunk, ALIGN=align,
        TRANSPOSED=transposed, HELD=key <= MOST_HELD, SILU=silu, SLOPE=slope_of is not None,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return out


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, ctx.scale, ctx.silu = inputs
    ctx.save_for_backward(q, k, v, output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    gradients = torch.ops.chela.linear_attention_bidirectional_backward.default(
        grad, *ctx.saved_tensors, ctx.scale, ctx.silu
    )
    return *gradients, None, None


differentiable("bidirectional", _keep, _differentiate)
differentiable("bidirectional_backward", keep_nothing, no_second_derivative)
