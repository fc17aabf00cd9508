"""The gated output in plain torch: its definition, one line after the other."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from chela.ops.dropout import dropout as drop
from chela.ops.moments import Moments, channel_moments
from chela.ops.precision import wide_dtype

EPS = 1e-6
"""What the norm adds to the mean square."""
STREAM = 2
"""Which of the seed's masks: `feed_forward` takes 0 and 1, so that a block may give one seed to both."""


def gated_output(
    m: Float[Tensor, "... v"],
    mixed: Float[Tensor, "... v_plus_2d"],
    residual: Float[Tensor, "... d"],
    weight: Float[Tensor, "d v"],
    bias: Float[Tensor, " d"] | None,
    *,
    gain: Float[Tensor, " v"] | None,
    heads: int,
    dropout: float,
    seed: Int[Tensor, ""] | None,
    mask: Bool[Tensor, "..."] | None,
    moments: bool,
) -> tuple[Float[Tensor, "... d"], Moments | None]:
    """Run it; arguments as in `chela.ops.gated_output`, already checked. Moments are computed if asked for.

    The product takes its inputs in the dtype of `mixed`; all else is in that of sums.
    """
    dtype, wide = mixed.dtype, wide_dtype(mixed.dtype)
    d, v = weight.shape
    gate, h, p = mixed.to(wide).split([v, d, d], dim=-1)
    normed = m.to(wide)
    if gain is not None:
        by_head = normed.unflatten(-1, (heads, v // heads))
        by_head = by_head * torch.rsqrt(by_head.square().mean(-1, keepdim=True) + EPS)
        normed = by_head.flatten(-2) * gain.to(wide)
    u = F.silu(gate) * normed
    pre = h + F.linear(u.to(dtype), weight.to(dtype)).to(wide)
    if bias is not None:
        pre = pre + bias.to(wide)
    a = F.silu(pre)
    if seed is not None:
        a = drop(a, seed, dropout, stream=STREAM)
    before = residual.to(wide)
    y = (before + torch.sigmoid(p) * (a - before)).to(residual.dtype)
    return y, channel_moments(y, mask) if moments else None
