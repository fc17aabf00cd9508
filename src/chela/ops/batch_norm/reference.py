"""Batch norm in plain torch: the specification of the kernels."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chela.ops.moments import Moments, channel_moments


def batch_norm(
    x: Float[Tensor, "... d"],
    weight: Float[Tensor, " d"],
    bias: Float[Tensor, " d"],
    *,
    mask: Bool[Tensor, "..."] | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "... d"], Moments]:
    """Normalise; arguments and result as `chela.ops.batch_norm`."""
    mean, variance, count = channel_moments(x, mask)
    y = (x.to(mean.dtype) - mean) * torch.rsqrt(variance + eps) * weight + bias
    return y.to(dtype), Moments(mean.detach(), variance.detach(), count)
