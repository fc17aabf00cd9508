"""Linear attention on Triton kernels: launches, registration with torch, and gradients.

The registered ops are functional: they take tensors, return new ones, and a compiler sees nothing inside. An output
that was not asked for is an empty tensor, since a schema cannot leave one out.
"""

from typing import Any

import torch
from torch import Tensor

from chela.ops.linear_attention import kernels, kernels_backward, kernels_one_walk
from chela.ops.linear_attention.plan import MAX_KEY, BackwardPlan, Plan, backward_plan, forward_plan, sums_plan, tile


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    decay: Tensor | None,
    state: Tensor | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Run the kernels; arguments as in `chela.ops.linear_attention`, already checked.

    Raises:
        ValueError: float64, or K beyond the kernels' limit.
    """
    _check_limits(q)
    if not causal:
        return torch.ops.chela.linear_attention_bidirectional.default(q, k, v, scale)[0], None
    if scale == 0:  # nothing reaches the output, and the kernels divide by it
        q, scale = q * 0, 1.0
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, decay, state))
    out, final, _ = torch.ops.chela.linear_attention_causal.default(
        q, k, v, decay, state, cu_seqlens, scale, return_state, wanted
    )
    return out, final if return_state else None


def linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, scale: float, decay: Tensor | None, inplace: bool
) -> tuple[Tensor, Tensor]:
    """Take one token; arguments as in `chela.ops.linear_attention_step`, already checked."""
    _check_limits(q)
    if inplace:
        return torch.ops.chela.linear_attention_step_.default(q, k, v, state, decay, scale), state
    return torch.ops.chela.linear_attention_step.default(q, k, v, state, decay, scale)


def _check_limits(q: Tensor) -> None:
    if q.dtype == torch.float64:
        raise ValueError("the Triton kernels sum in float32: for float64 inputs use impl='reference'")
    if q.shape[-1] > MAX_KEY:
        raise ValueError(
            f"the Triton kernels take keys up to K = {MAX_KEY}; got {q.shape[-1]}: use more heads or impl='reference'"
        )


# Registered by schema, not by torch.library.custom_op: that loads the compiler, 1.7 s, when the op is first called.
_TAG = torch.Tag.pt2_compliant_tag
_CARRIED = "Tensor? decay, Tensor? state, Tensor? cu_seqlens, float scale"
_SCHEMAS = {
    "causal": f"(Tensor q, Tensor k, Tensor v, {_CARRIED}, bool ends, bool saves) -> (Tensor, Tensor, Tensor)",
    "causal_backward": (
        f"(Tensor? grad, Tensor? end_grad, Tensor q, Tensor k, Tensor v, Tensor saved, {_CARRIED})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "bidirectional": "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    "bidirectional_backward": (
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor total, float scale) -> (Tensor, Tensor, Tensor)"
    ),
    "step_": "(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor? decay, float scale) -> Tensor",
    "step": "(Tensor q, Tensor k, Tensor v, Tensor state, Tensor? decay, float scale) -> (Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"chela::linear_attention_{_name}", _schema, tags=_TAG)


def _rows(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _inputs(*tensors: Tensor) -> tuple[list[Tensor], list[int], int]:
    """Tensors whose last axis is dense, their strides over the other axes in units of some entries, and the unit.

    8 entries are the 16 bytes of the widest load, in the narrowest dtype.
    """
    dense = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    strides = [x.stride(axis) for x in dense for axis in range(x.dim() - 1)]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return dense, [stride // unit for stride in strides], unit


def _log2(decay: Tensor | None) -> Tensor | None:
    return None if decay is None else decay.float().log2()


def _summed_states(
    k: Tensor, v: Tensor, plan: Plan, log2_decay: Tensor | None, cu_seqlens: Tensor | None, **kind: bool
) -> Tensor:
    """What each split of `plan` adds [rows, H, splits, K, V], in float32."""
    (k, v), strides, align = _inputs(k, v)
    rows, length, heads, key, value = _rows(k, cu_seqlens), *k.shape[1:], v.shape[3]
    sums = k.new_empty(rows, heads, plan.splits, key, value, dtype=torch.float32)
    tiles = sums_plan(key, value, k.dtype)
    kernels.state_sums[(rows * heads * plan.splits * tiles.programs(value),)](
        k, v, sums, log2_decay, cu_seqlens, length, heads, plan.splits, plan.unit, *strides,
        K=key, V=value, BK=tiles.key_tile, BV=tiles.value_tile, C=tiles.chunk, ALIGN=align,
        DECAYS=log2_decay is not None, PACKED=cu_seqlens is not None, **kind,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return sums


def _split_starts(
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    plan: Plan,
    log2_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    backward: bool,
) -> Tensor | None:
    """The state each split starts from [rows, H, splits, K, V]: before it, or behind it in the backward pass."""
    if plan.splits == 1:
        return start
    sums = _summed_states(k, v, plan, log2_decay, cu_seqlens, BACKWARD=backward, ALL=False)
    rows, heads, _, key, value = sums.shape
    block = 512
    kernels.scan_states[(rows * heads, -(-key * value // block))](
        sums, start, log2_decay, cu_seqlens, k.shape[1], heads, plan.splits, plan.unit,
        SIZE=key * value, BLOCK=block, DECAYS=log2_decay is not None, PACKED=cu_seqlens is not None,
        STARTS=start is not None, BACKWARD=backward,
    )  # fmt: skip
    return sums


def _plans(q: Tensor, v: Tensor, decay: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Plan, BackwardPlan]:
    """Sizes of both passes: the forward pass saves states where the backward pass wants them."""
    shape = (_rows(q, cu_seqlens) * q.shape[2], q.shape[1], q.shape[3], v.shape[3], q.dtype, q.device)
    return forward_plan(*shape), backward_plan(*shape, decays=decay is not None)


@torch.library.impl("chela::linear_attention_causal", "default")
def _causal(
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
    out, final, saved = _causal_shapes(q, k, v, decay, state, cu_seqlens, scale, ends, saves)
    rows, length, heads, key, value = _rows(q, cu_seqlens), *q.shape[1:], v.shape[3]
    if rows * heads == 0:
        return out, final, saved
    (plan, back), log2_decay = _plans(q, v, decay, cu_seqlens), _log2(decay)
    state = None if state is None else state.contiguous()
    start = _split_starts(k, v, state, plan, log2_decay, cu_seqlens, backward=False)
    (q, k, v), strides, align = _inputs(q, k, v)
    kernels.causal_forward[(rows * heads * plan.splits * plan.programs(value),)](
        q, k, v, out, start, saved, final, log2_decay, cu_seqlens,
        scale, length, heads, plan.splits, plan.unit, back.period, back.slots(length), *strides,
        K=key, V=value, BK=plan.key_tile, BV=plan.value_tile, C=plan.chunk, ALIGN=align,
        DECAYS=decay is not None, PACKED=cu_seqlens is not None, STARTS=start is not None,
        SAVES=saves and back.saves, ENDS=ends, num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return out, final, saved


@torch.library.register_fake("chela::linear_attention_causal")
def _causal_shapes(
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
    rows, length, heads, key, value = _rows(q, cu_seqlens), *q.shape[1:], v.shape[3]
    final = q.new_empty((rows, heads, key, value) if ends else 0, dtype=torch.float32)
    back = _plans(q, v, decay, cu_seqlens)[1]
    # Packed documents need at most one state more each than all tokens in a row would.
    slots = rows * back.slots(length) if cu_seqlens is None else length // back.period + rows
    saved = q.new_empty((slots, heads, key, value) if saves and back.saves else 0, dtype=torch.float32)
    return v.new_empty(v.shape), final, saved


@torch.library.impl("chela::linear_attention_causal_backward", "default")
def _causal_backward(
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
    dq, dk, dv, d_decay, d_state = _causal_backward_shapes(
        grad, end_grad, q, k, v, saved, decay, state, cu_seqlens, scale
    )
    rows, length, heads, key, value = _rows(q, cu_seqlens), *q.shape[1:], v.shape[3]
    if rows * heads == 0:
        return dq, dk, dv, d_decay.zero_(), d_state
    plan, log2_decay = _plans(q, v, decay, cu_seqlens)[1], _log2(decay)
    grad = torch.zeros_like(v) if grad is None else grad
    # The kernels carry the state's gradient over `scale`, so that all they write is scaled alike.
    over_scale = None if end_grad is None else (end_grad / scale).contiguous()
    ends = _split_starts(q, grad, over_scale, plan, log2_decay, cu_seqlens, backward=True)
    groups = plan.programs(value)
    programs = rows * heads * plan.splits * groups
    # Each group of columns of V gives a part of dq and dk; a single one gives them whole.
    parts = [x if groups == 1 else x.new_empty(groups, *x.shape, dtype=torch.float32) for x in (dq, dk)]
    d_logs = q.new_zeros(programs if decay is not None else 0, dtype=torch.float32)
    (q, k, v, grad), strides, align = _inputs(q, k, v, grad)
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
        scale, *cut, *saving, tokens, *strides, **options,
    )  # fmt: skip
    if groups > 1:
        dq, dk = (part.sum(0).to(q.dtype) for part in parts)
    if decay is not None:
        d_decay = (d_logs.view(rows, heads, -1).sum((0, 2)) / decay).to(decay.dtype)
    return dq, dk, dv, d_decay, d_state


@torch.library.register_fake("chela::linear_attention_causal_backward")
def _causal_backward_shapes(
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


def _keep_causal(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, decay, state, cu_seqlens, ctx.scale, _, _ = inputs
    ctx.save_for_backward(q, k, v, output[2], decay, state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate_causal(ctx: Any, grad: Tensor | None, end_grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    q, k, v, saved, decay, state, cu_seqlens = ctx.saved_tensors
    if grad is None and end_grad is None:
        return (None,) * 9
    dq, dk, dv, d_decay, d_state = torch.ops.chela.linear_attention_causal_backward.default(
        grad, end_grad, q, k, v, saved, decay, state, cu_seqlens, ctx.scale
    )
    d_decay, d_state = (d_decay if decay is not None else None), (d_state if state is not None else None)
    return dq, dk, dv, d_decay, d_state, None, None, None, None


@torch.library.impl("chela::linear_attention_bidirectional", "default")
def _bidirectional(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and the sum of all k v^T [B, H, K, V]."""
    return _applied(q, total := _total(k, v), scale, v.shape[3]), total


@torch.library.register_fake("chela::linear_attention_bidirectional")
def _bidirectional_shapes(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, _, heads, key = q.shape
    return v.new_empty(v.shape), q.new_empty(batch, heads, key, v.shape[3], dtype=torch.float32)


@torch.library.impl("chela::linear_attention_bidirectional_backward", "default")
def _bidirectional_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, total: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    over_scale = _total(q, grad)
    return (
        _applied(grad, total, scale, q.shape[3], transposed=True),
        _applied(v, over_scale, scale, k.shape[3], transposed=True),
        _applied(k, over_scale, scale, v.shape[3]),
    )


@torch.library.register_fake("chela::linear_attention_bidirectional_backward")
def _bidirectional_backward_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, total: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _total(k: Tensor, v: Tensor) -> Tensor:
    """The sum over all tokens of k v^T [B, H, K, V]."""
    batch, length, heads, key = k.shape
    plan = forward_plan(batch * heads, length, key, v.shape[3], k.dtype, k.device)
    if not k.numel() or not v.numel():
        return k.new_zeros(batch, heads, key, v.shape[3], dtype=torch.float32)
    return _summed_states(k, v, plan, None, None, BACKWARD=False, ALL=True).sum(2)


def _applied(q: Tensor, state: Tensor, scale: float, width: int, *, transposed: bool = False) -> Tensor:
    """The products scale * q S [B, T, H, width], with S or its transpose."""
    batch, length, heads, key = q.shape
    out = q.new_empty(batch, length, heads, width)
    if not out.numel():
        return out
    (q,), strides, align = _inputs(q)
    chunk, value_tile = 64, tile(width, 128)
    grid = (batch * heads * -(-width // value_tile), -(-length // chunk))
    kernels.times_state[grid](
        q, state, out, scale, length, heads, *strides,
        K=key, V=width, BK=tile(key, 64), BV=value_tile, C=chunk, ALIGN=align, TRANSPOSED=transposed,
        num_warps=4,
    )  # fmt: skip
    return out


def _keep_bidirectional(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, output[1])


def _differentiate_bidirectional(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    return *torch.ops.chela.linear_attention_bidirectional_backward.default(grad, *ctx.saved_tensors, ctx.scale), None


@torch.library.impl("chela::linear_attention_step", "default")
def _step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out, after = _step_shapes(q, k, v, state, decay, scale)
    _launch_step(q, k, v, state.contiguous(), out, after, decay, scale)
    return out, after


@torch.library.impl("chela::linear_attention_step_", "default")
def _step_in_place(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor | None, scale: float) -> Tensor:
    out = _step_in_place_shape(q, k, v, state, decay, scale)
    dense = state.contiguous()
    _launch_step(q, k, v, dense, out, dense, decay, scale)
    if dense is not state:
        state.copy_(dense)
    return out


@torch.library.register_fake("chela::linear_attention_step_")
def _step_in_place_shape(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor | None, scale: float) -> Tensor:
    return v.new_empty(v.shape)


def _launch_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, out: Tensor, after: Tensor, decay: Tensor | None, scale: float
) -> None:
    rows, heads, key, value = state.shape
    if not rows * heads:
        return
    (q, k, v), strides, align = _inputs(q, k, v)
    key_tile = tile(key, MAX_KEY)
    value_tile = tile(value, max(16, 4096 // key_tile))
    kernels.step[(rows * heads * -(-value // value_tile),)](
        q, k, v, state, out, after, _log2(decay), scale, heads, *strides,
        K=key, V=value, BK=key_tile, BV=value_tile, ALIGN=align, DECAYS=decay is not None, num_warps=4,
    )  # fmt: skip


@torch.library.register_fake("chela::linear_attention_step")
def _step_shapes(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


def _keep_step(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, state, decay, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, output[1], state, decay)


def _differentiate_step(ctx: Any, grad: Tensor, end_grad: Tensor) -> tuple[Any, ...]:
    """In plain torch: who trains token by token is not in a hurry."""
    q, k, v, after, state, decay = ctx.saved_tensors
    wide = grad.float() * ctx.scale
    dq = torch.einsum("bhv,bhkv->bhk", wide, after)
    d_after = end_grad + q.float().unsqueeze(-1) * wide.unsqueeze(-2)
    dk = torch.einsum("bhkv,bhv->bhk", d_after, v.float())
    dv = torch.einsum("bhkv,bhk->bhv", d_after, k.float())
    d_decay = None if decay is None else (d_after * state).sum((0, 2, 3)).to(decay.dtype)
    d_state = d_after if decay is None else d_after * decay.float()[:, None, None]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_state, d_decay, None


torch.library.register_autograd("chela::linear_attention_causal", _differentiate_causal, setup_context=_keep_causal)
torch.library.register_autograd(
    "chela::linear_attention_bidirectional", _differentiate_bidirectional, setup_context=_keep_bidirectional
)
torch.library.register_autograd("chela::linear_attention_step", _differentiate_step, setup_context=_keep_step)
