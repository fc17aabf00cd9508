"""Causal linear attention as a registered op, forward and backward."""

from typing import Any

import torch
from torch import Tensor

from chela.ops.linear_attention import kernels, kernels_backward, kernels_one_walk
from chela.ops.linear_attention.launch import (
    count_rows,
    define,
    dense,
    differentiable,
    keep_nothing,
    log2,
    no_second_derivative,
    split_starts,
)
from chela.ops.linear_attention.plan import BackwardPlan, Plan, plans

_CARRIED = "Tensor? decay, Tensor? state, Tensor? cu_seqlens, float scale"
define("causal", f"(Tensor q, Tensor k, Tensor v, {_CARRIED}, bool ends, bool saves) -> (Tensor, Tensor, Tensor)")
define(
    "causal_backward",
    f"(Tensor? grad, Tensor? end_grad, Tensor q, Tensor k, Tensor v, Tensor saved, {_CARRIED})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    ends: bool,
    saves: bool,
) -> tuple[Tensor, Tensor]:
    """Output, and the state after each row if it `ends`; `saves` what gradients will need."""
    out, final, _ = torch.ops.chela.linear_attention_causal.default(
        q, k, v, decay, state, cu_seqlens, scale, ends, saves
    )
    return out, final


def _plans(q: Tensor, v: Tensor, decay: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Plan, BackwardPlan]:
    """Sizes of both passes: the forward pass saves states where the backward pass wants them."""
    _, length, heads, key = q.shape
    return plans(
        count_rows(q, cu_seqlens) * heads, length, key, v.shape[3], q.dtype, q.device, decays=decay is not None
    )


@torch.library.impl("chela::linear_attention_causal", "default")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    ends: bool,
    saves: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, the state after each row, and the states that the backward pass starts from."""
    out, final, saved = _forward_shapes(q, k, v, decay, state, cu_seqlens, scale, ends, saves)
    rows, length, heads, key, value = count_rows(q, cu_seqlens), *q.shape[1:], v.shape[3]
    if rows * heads == 0:
        return out, final, saved
    (plan, back), log2_decay = _plans(q, v, decay, cu_seqlens), log2(decay)
    state = None if state is None else state.contiguous()
    start = split_starts(k, v, state, plan, log2_decay, cu_seqlens, backward=False)
    (q, k, v), strides, align = dense(q, k, v)
    kernels.causal_forward[(rows * heads * plan.splits * plan.programs(value),)](
        q, k, v, out, start, saved, final, log2_decay, cu_seqlens,
        scale, length, heads, plan.splits, plan.unit, back.period, back.slots(length), *strides,
        K=key, V=value, BK=plan.key_tile, BV=plan.value_tile, C=plan.chunk, ALIGN=align,
        DECAYS=decay is not None, PACKED=cu_seqlens is not None, STARTS=start is not None,
        SAVES=saves and back.saves, ENDS=ends, num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return out, final, saved


@torch.library.register_fake("chela::linear_attention_causal")
def _forward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    ends: bool,
    saves: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, length, heads, key, value = count_rows(q, cu_seqlens), *q.shape[1:], v.shape[3]
    final = q.new_empty((rows, heads, key, value) if ends else 0, dtype=torch.float32)
    back = _plans(q, v, decay, cu_seqlens)[1]
    # Packed documents need at most one state more each than all tokens in a row would.
    slots = rows * back.slots(length) if cu_seqlens is None else length // back.period + rows
    saved = q.new_empty((slots, heads, key, value) if saves and back.saves else 0, dtype=torch.float32)
    return v.new_empty(v.shape), final, saved


@torch.library.impl("chela::linear_attention_causal_backward", "default")
def _backward(
    grad: Tensor | None,
    end_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saved: Tensor,
    decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, decay and state, given those of the output and of the final state."""
    dq, dk, dv, d_decay, d_state = _backward_shapes(grad, end_grad, q, k, v, saved, decay, state, cu_seqlens, scale)
    rows, length, heads, key, value = count_rows(q, cu_seqlens), *q.shape[1:], v.shape[3]
    if rows * heads == 0:
        return dq, dk, dv, d_decay.zero_(), d_state
    plan, log2_decay = _plans(q, v, decay, cu_seqlens)[1], log2(decay)
    grad = torch.zeros_like(v) if grad is None else grad
    # The kernels carry the state's gradient over `scale`, so that all they write is scaled alike.
    over_scale = None if end_grad is None else (end_grad / scale).contiguous()
    ends = split_starts(q, grad, over_scale, plan, log2_decay, cu_seqlens, backward=True)
    groups = plan.programs(value)
    programs = rows * heads * plan.splits * groups
    # Each group of columns of V gives a part of dq and dk, no finer than their sum; a single one gives them whole.
    narrow = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    parts = [x if groups == 1 else x.new_empty(groups, *x.shape, dtype=narrow) for x in (dq, dk)]
    d_logs = q.new_zeros(programs if decay is not None else 0, dtype=torch.float32)
    (q, k, v, grad), strides, align = dense(q, k, v, grad)
    cut = (length, heads, plan.splits, plan.unit)
    saving = (plan.period, plan.slots(length))
    options = {
        "K": key, "V": value, "BK": plan.key_tile, "BV": plan.value_tile, "C": plan.chunk, "ALIGN": align,
        "PACKED": cu_seqlens is not None, "STARTS": state is not None, "ENDS": ends is not None,
        "num_warps": plan.warps, "num_stages": plan.stages,
    }  # fmt: skip
    if plan.one_walk:
        kernels_one_walk.all_gradients[(programs,)](
            q, k, v, grad, dq, dk, dv, ends, saved, d_state, cu_seqlens, scale, *cut, *saving, *strides, **options
        )
        return dq, dk, dv, d_decay, d_state
    options |= {"BLOCKS": plan.blocks, "DECAYS": decay is not None}
    tokens = q.shape[0] * length
    state = None if state is None else state.contiguous()
    kernels_backward.key_value_gradients[(programs,)](
        q, k, v, grad, parts[1], dv, ends, d_state, log2_decay, cu_seqlens, scale, *cut, tokens, *strides, **options
    )
    kernels_backward.query_gradients[(programs,)](
        q, k, v, grad, parts[0], state, ends, saved, d_logs, log2_decay, cu_seqlens,
        scale, *cut, *saving, tokens, *strides, **options | {"C": plan.query_chunk, "num_stages": plan.query_stages},
    )  # fmt: skip
    if groups > 1:
        entries, block = dq.numel(), 1024
        kernels_backward.sum_groups[(-(-entries // block),)](*parts, dq, dk, entries, GROUPS=groups, BLOCK=block)
    if decay is not None:
        d_decay = (d_logs.view(rows, heads, -1).sum((0, 2)) / decay).to(decay.dtype)
    return dq, dk, dv, d_decay, d_state


@torch.library.register_fake("chela::linear_attention_causal_backward")
def _backward_shapes(
    grad: Tensor | None,
    end_grad: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saved: Tensor,
    decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_decay = q.new_empty(0) if decay is None else decay.new_empty(decay.shape)
    d_state = q.new_empty(0) if state is None else state.new_empty(state.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_decay, d_state


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, decay, state, cu_seqlens, ctx.scale, _, _ = inputs
    ctx.save_for_backward(q, k, v, output[2], decay, state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, end_grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    q, k, v, saved, decay, state, cu_seqlens = ctx.saved_tensors
    if grad is None and end_grad is None:
        return (None,) * 9
    dq, dk, dv, d_decay, d_state = torch.ops.chela.linear_attention_causal_backward.default(
        grad, end_grad, q, k, v, saved, decay, state, cu_seqlens, ctx.scale
    )
    d_decay, d_state = (d_decay if decay is not None else None), (d_state if state is not None else None)
    return dq, dk, dv, d_decay, d_state, None, None, None, None


differentiable("causal", _keep, _differentiate)
differentiable("causal_backward", keep_nothing, no_second_derivative)
