"""Attention over a shared representation on Triton's kernels: launch, registration with torch, derivative."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from chela.ops.launch import ceil, dense, grid, no_second_derivative, power, rows
from chela.ops.linear_attention import plan
from chela.ops.shared_attention import WIDEST, kernels


class Tile(NamedTuple):
    """How a kernel is cut. None of it depends on the number of tokens."""

    tokens: int
    values: int
    """Most columns of a head's values at a time."""
    warps: int
    stages: int


class Plan(NamedTuple):
    """Tiles of the three kernels."""

    sums: Tile
    attend: Tile
    gradients: Tile


PLANS = {
    2: Plan(Tile(64, 64, 4, 4), Tile(64, 128, 4, 1), Tile(64, 64, 8, 2)),
    4: Plan(Tile(32, 32, 4, 2), Tile(32, 64, 4, 1), Tile(32, 32, 4, 1)),
}
"""By the bytes of a number in the products."""


def shared_attention(
    shared: Tensor,
    values: Tensor,
    q_gain: Tensor,
    q_bias: Tensor,
    k_gain: Tensor,
    k_bias: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Run the kernels; arguments as in `chela.ops.shared_attention`, already checked.

    Raises:
        ValueError: float64, or keys wider than the kernels take.
    """
    if shared.dtype == torch.float64:
        raise ValueError("shared_attention's Triton kernels keep sums in float32: for float64 use impl='reference'")
    if shared.shape[2] > WIDEST:
        raise ValueError(
            f"shared_attention's Triton kernels take at most K = {WIDEST} and shared has {shared.shape[2]}: "
            "use impl='reference'"
        )
    leaves = shared, values, q_gain, q_bias, k_gain, k_bias
    return torch.ops.chela.shared_attention.default(*leaves, mask, scale)[0]


# Registered by schema, not by torch.library.custom_op: that loads the compiler when the op is first called.
_TAG = torch.Tag.pt2_compliant_tag
_INPUTS = (
    "Tensor shared, Tensor values, Tensor q_gain, Tensor q_bias, Tensor k_gain, Tensor k_bias, Tensor? mask, "
    "float scale"
)
torch.library.define("chela::shared_attention", f"({_INPUTS}) -> (Tensor, Tensor)", tags=_TAG)
torch.library.define(
    "chela::shared_attention_backward",
    f"(Tensor grad, Tensor state, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAG,
)


class _Sizes:
    """Sizes that all kernels of a call share."""

    def __init__(self, shared: Tensor, values: Tensor, heads: int):
        self.batch, self.length, self.key = shared.shape
        self.heads, self.width = heads, values.shape[2] // heads
        self.plan = PLANS[shared.dtype.itemsize]

    def constants(self, tile: Tile) -> dict[str, Any]:
        """Constants of a kernel."""
        return {
            "H": self.heads,
            "K": self.key,
            "HV": self.width,
            "C": tile.tokens,
            "BK": max(16, power(self.key)),
            "BV": min(tile.values, max(16, power(self.width))),
            "num_warps": tile.warps,
        }


@torch.library.impl("chela::shared_attention", "default")
def _forward(
    shared: Tensor,
    values: Tensor,
    q_gain: Tensor,
    q_bias: Tensor,
    k_gain: Tensor,
    k_bias: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and, for the backward pass, A [B, H, K, V / H] in the dtype of the products."""
    m, state = _forward_shapes(shared, values, q_gain, q_bias, k_gain, k_bias, mask, scale)
    if not m.numel() or not shared.numel():
        return m.zero_(), state.zero_()
    on = _Sizes(shared, values, len(q_gain))
    with torch.cuda.device_of(shared):
        state = _summed(on, shared, values, k_gain, k_bias, mask, keys=True)
        constants, left = on.constants(on.plan.attend), rows(shared)
        programs = on.batch * on.heads * ceil(on.width, constants["BV"])
        grid(kernels.attend, programs, ceil(on.length, constants["C"]))(
            m, left, state, q_gain.contiguous(), q_bias.contiguous(), scale, on.length, left.stride(0), **constants
        )
    return m, state


def _summed(
    on: _Sizes, shared: Tensor, right: Tensor, gain: Tensor, bias: Tensor, mask: Tensor | None, *, keys: bool
) -> Tensor:
    """A, or E without `keys` [B, H, K, V / H]; rows too few to fill the GPU are split in time."""
    tile = on.plan.sums
    constants = on.constants(tile)
    groups = on.batch * on.heads * ceil(on.width, constants["BV"])
    splits = max(1, min(2 * plan.multiprocessors(shared.device) // groups, ceil(on.length, tile.tokens)))
    sums = shared.new_empty(on.batch, on.heads, splits, on.key, on.width, dtype=torch.float32)
    left, right = rows(shared), rows(right)
    grid(kernels.sum_states, groups * splits)(
        sums, left, right, gain.contiguous(), bias.contiguous(), dense(mask), on.length, splits,
        left.stride(0), right.stride(0), KEYS=keys, MASKED=mask is not None, STAGES=tile.stages, **constants,
    )  # fmt: skip
    return sums.sum(2).to(shared.dtype)


@torch.library.impl("chela::shared_attention_backward", "default")
def _backward(
    grad: Tensor,
    state: Tensor,
    shared: Tensor,
    values: Tensor,
    q_gain: Tensor,
    q_bias: Tensor,
    k_gain: Tensor,
    k_bias: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of shared, values and the four parameters."""
    leaves = shared, values, q_gain, q_bias, k_gain, k_bias
    results = _backward_shapes(grad, state, *leaves, mask, scale)
    if not grad.numel() or not shared.numel():
        return tuple(result.zero_() for result in results)
    on = _Sizes(shared, values, len(q_gain))
    tile = on.plan.gradients
    tiles = ceil(on.length, tile.tokens)
    partial = shared.new_empty(on.batch * tiles, 4, on.heads, on.key, dtype=torch.float32)
    with torch.cuda.device_of(shared):
        of_queries = _summed(on, shared, grad, q_gain, q_bias, None, keys=False)
        g, left, right = rows(grad), rows(shared), rows(values)
        grid(kernels.differentiate, tiles, on.batch)(
            *results[:2], partial, g, left, right, state.contiguous(), of_queries,
            q_gain.contiguous(), k_gain.contiguous(), k_bias.contiguous(), dense(mask), scale, on.length,
            g.stride(0), left.stride(0), right.stride(0),
            MASKED=mask is not None, STAGES=tile.stages, **on.constants(tile),
        )  # fmt: skip
    for result, total in zip(results[2:], partial.sum(0), strict=True):
        result.copy_(total)
    return results


@torch.library.register_fake("chela::shared_attention")
def _forward_shapes(
    shared: Tensor,
    values: Tensor,
    q_gain: Tensor,
    q_bias: Tensor,
    k_gain: Tensor,
    k_bias: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    heads = q_gain.shape[0]
    state = shared.new_empty(shared.shape[0], heads, shared.shape[2], values.shape[2] // heads)
    return values.new_empty(values.shape), state


@torch.library.register_fake("chela::shared_attention_backward")
def _backward_shapes(
    grad: Tensor,
    state: Tensor,
    shared: Tensor,
    values: Tensor,
    q_gain: Tensor,
    q_bias: Tensor,
    k_gain: Tensor,
    k_bias: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(like.shape) for like in (shared, values, q_gain, q_bias, k_gain, k_bias))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    return *torch.ops.chela.shared_attention_backward.default(grad, *ctx.saved_tensors, ctx.scale), None, None


torch.library.register_autograd("chela::shared_attention", _differentiate, setup_context=_save)
torch.library.register_autograd("chela::shared_attention_backward", no_second_derivative("shared_attention"))
