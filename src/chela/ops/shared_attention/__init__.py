"""Attention over the whole sequence whose queries and keys are two maps of one shared representation."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chela.ops.checks import check_alike, check_shape
from chela.ops.impl import Impl, resolve
from chela.ops.precision import no_autocast
from chela.ops.shared_attention import reference

WIDEST = 128
"""Widest keys K that the Triton kernels take; V may be anything."""


def shared_attention(
    shared: Float[Tensor, "b t k"],
    values: Float[Tensor, "b t v"],
    q_gain: Float[Tensor, "h k"],
    q_bias: Float[Tensor, "h k"],
    k_gain: Float[Tensor, "h k"],
    k_bias: Float[Tensor, "h k"],
    *,
    mask: Bool[Tensor, "b t"] | None = None,
    scale: float = 1.0,
    impl: Impl = "auto",
) -> Float[Tensor, "b t v"]:
    """Let every token see every other: `m_t = scale q_t sum_s k_s v_s^T` in each head.

    Here

        S = silu(shared)        q = S q_gain + q_bias        k = S k_gain + k_bias, zero where masked
        v = silu(values)

    This is `linear_attention(..., causal=False)` and what a CHELA layer does before it; queries, keys and activated
    values never take their way through memory. One representation for both sides is MEGA's (Ma et al. 2023), after Hua
    et al. 2022; the sum over all tokens is Katharopoulos et al. 2020's. Products take q, k, v and their sum in the
    dtype of `shared`; everything else and all sums are in float32 (float64 for float64), whatever autocast says.

    Args:
        shared: [B, T, K], before its SiLU.
        values: [B, T, V], heads side by side, before their SiLU, in the dtype of `shared`.
        q_gain: of the queries [H, K]; H divides V. Any floating dtype no wider than the sums', as all parameters.
        q_bias: likewise.
        k_gain: of the keys [H, K].
        k_bias: likewise.
        mask: bool [B, T], True at real tokens; the others are seen by none. None: all are real.
        scale: factor on the output.
        impl: "auto" (Triton on CUDA for K up to 128, the reference elsewhere and beyond), "triton" (K up to 128; no
            float64, no second derivative) or "reference".

    Returns:
        [B, T, V] in the dtype of `values`; at masked tokens, what they see.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the implementation cannot run here.
    """
    _check(shared, values, {"q_gain": q_gain, "q_bias": q_bias, "k_gain": k_gain, "k_bias": k_bias}, mask)
    if impl == "auto" and shared.shape[-1] > WIDEST:
        impl = "reference"
    leaves = shared, values, q_gain, q_bias, k_gain, k_bias
    if resolve(impl, shared.device, "shared_attention") == "triton":
        from chela.ops.shared_attention import fused

        return fused.shared_attention(*leaves, mask=mask, scale=scale)
    with no_autocast(shared.device):
        return reference.shared_attention(*leaves, mask=mask, scale=scale)


def _check(shared: Tensor, values: Tensor, parameters: dict[str, Tensor], mask: Tensor | None) -> None:
    if shared.dim() != 3 or values.dim() != 3 or shared.shape[:2] != values.shape[:2]:
        got = f"shared {list(shared.shape)}, values {list(values.shape)}"
        raise ValueError(f"shared must be [B, T, K] and values [B, T, V] of the same tokens; got {got}")
    check_alike({"shared": shared, "values": values}, {**parameters})
    gain = parameters["q_gain"]
    if gain.dim() != 2 or not gain.shape[0] or values.shape[2] % gain.shape[0]:
        raise ValueError(f"q_gain must be [H, K], H a divisor of V = {values.shape[2]}; got {list(gain.shape)}")
    for name, parameter in parameters.items():
        check_shape(name, parameter, (gain.shape[0], shared.shape[2]), "[H, K]")
    rows = shared.shape[:2]
    if mask is not None and (mask.dtype != torch.bool or mask.shape != rows or mask.device != shared.device):
        got = f"{mask.dtype} {list(mask.shape)} on {mask.device}"
        raise ValueError(f"mask must be bool [B, T] = {list(rows)} on the device of shared, {shared.device}; got {got}")
