"""One token of linear attention as a registered op, for decoding."""

from typing import Any

import torch
from torch import Tensor

from chela.ops.linear_attention import kernels
from chela.ops.linear_attention.launch import define, dense, differentiable, log2
from chela.ops.linear_attention.plan import MAX_KEY, tile

_TOKEN = "Tensor q, Tensor k, Tensor v"
define("step", f"({_TOKEN}, Tensor state, Tensor? decay, float scale) -> (Tensor, Tensor)")
define("step_", f"({_TOKEN}, Tensor(a!) state, Tensor? decay, float scale) -> Tensor")


def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output and the new state."""
    return torch.ops.chela.linear_attention_step.default(q, k, v, state, decay, scale)


def step_in_place(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor | None, scale: float) -> Tensor:
    """Output; the new state takes the old one's place."""
    return torch.ops.chela.linear_attention_step_.default(q, k, v, state, decay, scale)


@torch.library.impl("chela::linear_attention_step", "default")
def _step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out, after = _step_shapes(q, k, v, state, decay, scale)
    _launch(q, k, v, state.contiguous(), out, after, decay, scale)
    return out, after


@torch.library.impl("chela::linear_attention_step_", "default")
def _step_in_place(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor | None, scale: float) -> Tensor:
    out = _step_in_place_shape(q, k, v, state, decay, scale)
    written = state.contiguous()
    _launch(q, k, v, written, out, written, decay, scale)
    if written is not state:
        state.copy_(written)
    return out


@torch.library.register_fake("chela::linear_attention_step_")
def _step_in_place_shape(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor | None, scale: float) -> Tensor:
    return v.new_empty(v.shape)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, out: Tensor, after: Tensor, decay: Tensor | None, scale: float
) -> None:
    rows, heads, key, value = state.shape
    if not rows * heads:
        return
    (q, k, v), strides, align = dense(q, k, v)
    key_tile = tile(key, MAX_KEY)
    value_tile = tile(value, max(16, 4096 // key_tile))
    kernels.step[(rows * heads * -(-value // value_tile),)](
        q, k, v, state, out, after, log2(decay), scale, heads, *strides,
        K=key, V=value, BK=key_tile, BV=value_tile, ALIGN=align, DECAYS=decay is not None, num_warps=4,
    )  # fmt: skip


@torch.library.register_fake("chela::linear_attention_step")
def _step_shapes(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, state, decay, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, output[1], state, decay)


def _differentiate(ctx: Any, grad: Tensor, end_grad: Tensor) -> tuple[Any, ...]:
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


differentiable("step", _keep, _differentiate)
