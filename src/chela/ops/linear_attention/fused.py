"""Linear attention on Triton kernels: the entries that `chela.ops.linear_attention` calls.

Behind them are registered ops, functional but for the step in place: a compiler sees nothing of their inside.
An output that was not asked for is an empty tensor, since a schema cannot leave one out.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from chela.ops.linear_attention.bidirectional import attend_both_ways
from chela.ops.linear_attention.causal import attend
from chela.ops.linear_attention.decode import step, step_in_place
from chela.ops.linear_attention.plan import MAX_KEY


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
    silu: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run the kernels; arguments as in `chela.ops.linear_attention`, already checked.

    Raises:
        ValueError: float64, or K beyond the kernels' limit.
    """
    _check_limits(q)
    if not causal:
        return attend_both_ways(q, k, v, scale, silu), None
    if silu:  # a compiler makes it one with what v comes from
        v = F.silu(v)
    if scale == 0:  # nothing reaches the output, and the kernels divide by it
        q, scale = q * 0, 1.0
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, decay, state))
    out, final = attend(q, k, v, decay, state, cu_seqlens, scale, return_state, wanted)
    return out, final if return_state else None


def linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, scale: float, decay: Tensor | None, inplace: bool
) -> tuple[Tensor, Tensor]:
    """Take one token; arguments as in `chela.ops.linear_attention_step`, already checked."""
    _check_limits(q)
    if inplace:
        return step_in_place(q, k, v, state, decay, scale), state
    return step(q, k, v, state, decay, scale)


def _check_limits(q: Tensor) -> None:
    if q.dtype == torch.float64:
        raise ValueError("the Triton kernels sum in float32: for float64 inputs use impl='reference'")
    if q.shape[-1] > MAX_KEY:
        raise ValueError(
            f"the Triton kernels take keys up to K = {MAX_KEY}; got {q.shape[-1]}: use more heads or impl='reference'"
        )
