"""Mean and variance of every channel over a batch's real positions: what batch norm is made of."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chela.ops.precision import wide_dtype


class Moments(NamedTuple):
    """Of D channels, in the dtype of sums."""

    mean: Float[Tensor, " d"]
    variance: Float[Tensor, " d"]
    """Without Bessel's correction."""
    count: Float[Tensor, ""]
    """Of real positions, at least 1."""


def channel_moments(x: Float[Tensor, "... d"], mask: Bool[Tensor, "..."] | None = None) -> Moments:
    """Mean and variance of x [..., D] over the positions where the mask [...] is True, or over all."""
    wide = x.to(wide_dtype(x.dtype)).reshape(-1, x.shape[-1])
    # Both sums in one reading, of values moved by one of them: their squares then cancel little. Not by a running
    # mean: rounding would depend on it, and of several processes only the first one's is kept.
    one = wide[0].detach()
    moved = wide - one
    if mask is None:
        count = torch.full((), wide.shape[0], dtype=wide.dtype, device=x.device)
    else:
        weight = mask.reshape(-1, 1).to(wide.dtype)
        moved, count = moved * weight, weight.sum()
    count = count.clamp(min=1)
    shift, square = moved.sum(0) / count, moved.square().sum(0) / count
    return Moments(one + shift, (square - shift.square()).clamp(min=0), count)
