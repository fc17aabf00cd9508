"""What the ops on Triton kernels share: registration, strides, and sums of states over splits."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chela.ops.linear_attention import kernels_states
from chela.ops.linear_attention.plan import Plan, sums_plan


def define(name: str, schema: str) -> None:
    """Define the op `chela::linear_attention_{name}`.

    By schema, not by torch.library.custom_op: that loads the compiler, 1.7 s, when the op is first called.
    """
    torch.library.define(f"chela::linear_attention_{name}", schema, tags=torch.Tag.pt2_compliant_tag)


def differentiable(name: str, keep: Callable[..., None], differentiate: Callable[..., tuple[Any, ...]]) -> None:
    """Give the op its gradients: `keep(ctx, inputs, output)` after it ran, `differentiate(ctx, *gradients)` later.

    What torch.library.register_autograd does, in less than half of the time a call: short kernels wait for the host.
    """
    op = getattr(torch.ops.chela, f"linear_attention_{name}").default

    class Differentiated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            keep(ctx, inputs, output)
            return output

        backward = staticmethod(differentiate)

    def run(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return Differentiated.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    torch.library.impl(f"chela::linear_attention_{name}", "Autograd")(run)


def keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Stand for what an op without a derivative keeps."""


def no_second_derivative(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Stand for the derivative of a backward pass, and refuse it."""
    raise NotImplementedError("linear_attention's Triton kernels have no second derivative: use impl='reference'")


def count_rows(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """Sequences of a batch, or documents of a packed one."""
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def dense(*tensors: Tensor) -> tuple[list[Tensor], list[int], int]:
    """Tensors whose last axis is dense, their strides over the other axes in units of some entries, and the unit.

    8 entries are the 16 bytes of the widest load, in the narrowest dtype.
    """
    tensors_dense = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    strides = [stride for x in tensors_dense for stride in x.stride()[:-1]]
    if functools.reduce(operator.or_, strides) % 8:
        return tensors_dense, strides, 1
    return tensors_dense, [stride // 8 for stride in strides], 8


def log2(decay: Tensor | None) -> Tensor | None:
    """The decays' logarithms to base 2, in float32."""
    return None if decay is None else decay.float().log2()


def summed_states(
    k: Tensor,
    v: Tensor,
    plan: Plan,
    log2_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    backward: bool = False,
    whole: bool = False,
    silu: bool = False,
) -> Tensor:
    """What each split of `plan` adds [rows, H, splits, K, V], in float32; only if `whole`, the last one's too."""
    (k, v), strides, align = dense(k, v)
    rows, length, heads, key, value = count_rows(k, cu_seqlens), *k.shape[1:], v.shape[3]
    sums = k.new_empty(rows, heads, plan.splits, key, value, dtype=torch.float32)
    tiles = sums_plan(key, value, k.dtype, k.device)
    kernels_states.state_sums[(rows * heads * plan.splits * tiles.programs(value),)](
        k, v, sums, log2_decay, cu_seqlens, length, heads, plan.splits, plan.unit, *strides,
        K=key, V=value, BK=tiles.key_tile, BV=tiles.value_tile, C=tiles.chunk, ALIGN=align,
        DECAYS=log2_decay is not None, PACKED=cu_seqlens is not None, BACKWARD=backward, ALL=whole, SILU=silu,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return sums


def split_starts(
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
    sums = summed_states(k, v, plan, log2_decay, cu_seqlens, backward=backward)
    rows, heads, _, key, value = sums.shape
    block = 256
    kernels_states.scan_states[(rows * heads, -(-key * value // block))](
        sums, start, log2_decay, cu_seqlens, k.shape[1], heads, plan.splits, plan.unit,
        SIZE=key * value, BLOCK=block, AHEAD=8, DECAYS=log2_decay is not None, PACKED=cu_seqlens is not None,
        STARTS=start is not None, BACKWARD=backward, num_warps=2,
    )  # fmt: skip
    return sums
