"""Attention over a shared representation in plain torch: its definition, one line after the other."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from chela.ops.precision import wide_dtype


def shared_attention(
    shared: Float[Tensor, "b t k"],
    values: Float[Tensor, "b t v"],
    q_gain: Float[Tensor, "h k"],
    q_bias: Float[Tensor, "h k"],
    k_gain: Float[Tensor, "h k"],
    k_bias: Float[Tensor, "h k"],
    *,
    mask: Bool[Tensor, "b t"] | None,
    scale: float,
) -> Float[Tensor, "b t v"]:
    """Run it; arguments as in `chela.ops.shared_attention`, already checked.

    Products take their inputs in the dtype of `shared`; all else is in that of sums.
    """
    dtype, wide = shared.dtype, wide_dtype(shared.dtype)
    basis = F.silu(shared.to(wide)).unsqueeze(2)  # [B, T, 1, K]
    q = basis * q_gain.to(wide) + q_bias.to(wide)
    k = basis * k_gain.to(wide) + k_bias.to(wide)
    v = rearrange(F.silu(values.to(wide)), "b t (h v) -> b t h v", h=len(q_gain))
    if mask is not None:
        k = k.masked_fill(~mask[:, :, None, None], 0)
    q, k, v = (x.to(dtype).to(wide) for x in (q, k, v))
    total = torch.einsum("bthk,bthv->bhkv", k, v).to(dtype).to(wide)
    return rearrange(scale * torch.einsum("bthk,bhkv->bthv", q, total), "b t h v -> b t (h v)").to(dtype)
