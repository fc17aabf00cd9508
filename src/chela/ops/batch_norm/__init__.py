"""Batch norm as it trains: every channel by its mean and variance over the real positions of all sequences."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chela.ops.batch_norm import reference
from chela.ops.checks import check_alike, check_counts, check_shape
from chela.ops.impl import Impl, resolve
from chela.ops.moments import Moments
from chela.ops.precision import no_autocast

WIDEST = 1024
"""Most channels D of a row that the Triton kernels take."""


def batch_norm(
    x: Float[Tensor, "... d"],
    weight: Float[Tensor, " d"],
    bias: Float[Tensor, " d"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "... d"], Moments]:
    """Compute `(x - mean) / sqrt(variance + eps) * weight + bias` with x's own moments (Ioffe and Szegedy 2015).

    Mean and variance of a channel are over the positions where the mask is True; the others are normalised with them,
    too. Sums are in float32 (float64 for float64), whatever autocast says.

    Args:
        x: [..., D], any floating dtype.
        weight: [D], any floating dtype no wider than the sums'.
        bias: [D], likewise.
        mask: bool [...], True at positions that count; None for all.
        eps: added to the variance.
        dtype: of the result; None takes that of x.
        impl: "auto" (Triton on CUDA for D up to 1,024, the reference elsewhere and beyond), "triton" (D up to 1,024; no
            float64, no second derivative) or "reference".

    Returns:
        [..., D], and mean and variance [D] of x with the number of positions [], for running averages: no gradient
        flows through these.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the implementation cannot run here.
    """
    if x.dim() < 1:
        raise ValueError("x must be [..., D]; got a single number")
    d = x.shape[-1]
    for name, vector in (("weight", weight), ("bias", bias)):
        check_shape(name, vector, (d,), "[D]")
    check_alike({"x": x}, {"weight": weight, "bias": bias})
    check_counts(mask, "x", x)
    dtype = x.dtype if dtype is None else dtype
    if impl == "auto" and d > WIDEST:
        impl = "reference"
    if resolve(impl, x.device, "batch_norm") == "triton":
        from chela.ops.batch_norm import fused

        return fused.batch_norm(x, weight, bias, mask=mask, eps=eps, dtype=dtype)
    with no_autocast(x.device):
        return reference.batch_norm(x, weight, bias, mask=mask, eps=eps, dtype=dtype)
