"""The feed-forward part in plain torch: the lines that define it, one after the other."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from chela.ops.dropout import dropout as drop
from chela.ops.precision import wide_dtype

EPS = {"layer": 1e-5, "rms": 1e-6, "scale": 1e-6, "batch": 0.0, "none": 0.0}
"""What each norm adds to the mean square; of "batch" it is in the statistics."""


def feed_forward(
    x: Float[Tensor, "... d"],
    w1: Float[Tensor, "f d"],
    b1: Float[Tensor, " f"],
    w2: Float[Tensor, "d f"],
    b2: Float[Tensor, " d"],
    *,
    w3: Float[Tensor, "f d"] | None,
    bounded: bool,
    norm: str,
    gain: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    residual: Float[Tensor, "... d"],
    dropout: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> Float[Tensor, "... d"]:
    """Run it; arguments as in `chela.ops.feed_forward`, already checked; `dtype` is what the products take."""
    n = normalise(x, norm, gain, shift, mean, rstd).to(dtype)
    h = F.silu(F.linear(n, w1.to(dtype), b1.to(dtype)))
    if w3 is not None:
        u = F.linear(n, w3.to(dtype))
        h = h * (torch.tanh(u) if bounded else u)
    if seed is not None:
        h = drop(h, seed, dropout, stream=0)
    h = F.linear(h, w2.to(dtype), b2.to(dtype))
    if seed is not None:
        h = drop(h, seed, dropout, stream=1)
    return (residual + h).to(residual.dtype)


def normalise(
    x: Float[Tensor, "... d"],
    norm: str,
    gain: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> Float[Tensor, "... d"]:
    """Normalise every position over D, or with given statistics; all but "none" in the dtype of sums."""
    if norm == "none":
        return x
    wide = x.to(wide_dtype(x.dtype))
    if norm == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    if mean is not None and rstd is not None:
        wide = (wide - mean.to(wide.dtype)) * rstd.to(wide.dtype)
    else:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS[norm])
    if gain is not None:
        wide = wide * gain.to(wide.dtype)
    return wide if shift is None else wide + shift.to(wide.dtype)
