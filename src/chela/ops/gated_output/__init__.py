"""The end of a CHELA layer: attention's norm and gate, its product, SiLU, dropout, and the gate over the residual."""

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from chela.ops.checks import check_alike, check_counts, check_shape
from chela.ops.dropout import check_seed, threshold
from chela.ops.gated_output import reference
from chela.ops.impl import Impl, resolve
from chela.ops.moments import Moments
from chela.ops.precision import no_autocast

WIDEST = 256
"""Most channels D of a row that the Triton kernels take; V may be anything."""


def gated_output(
    m: Float[Tensor, "... v"],
    mixed: Float[Tensor, "... v_plus_2d"],
    residual: Float[Tensor, "... d"],
    weight: Float[Tensor, "d v"],
    bias: Float[Tensor, " d"] | None = None,
    *,
    gain: Float[Tensor, " v"] | None = None,
    heads: int = 1,
    dropout: float = 0.0,
    seed: Int[Tensor, ""] | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "... d"]:
    """Compute `residual + sigmoid(p) (a - residual)` for every position.

    Here gate, h and p are the parts of `mixed`, and

        a = drop(silu(h + W u + bias))
        u = silu(gate) * norm(m) * gain
        norm(m) = m / sqrt(mean of m^2 over each head's V / H columns + 1e-6)

    Without a gain there is no norm: u = silu(gate) * m. The form is MEGA's (Ma et al. 2023). The product takes u and
    the weight in the dtype of `mixed` and is rounded to it; everything else and all sums are in float32 (float64 for
    float64), whatever autocast says. The product is torch's: in float32 it is as exact as
    `torch.set_float32_matmul_precision` allows. Dropout is `chela.ops.dropout`'s, of stream 2 of the seed, so that the
    same seed drops the same entries in every implementation; it may be the seed of a block's `feed_forward` too.

    Args:
        m: attention's output [..., V], heads side by side.
        mixed: gate [V], h [D] and p [D] of every position side by side [..., V + 2D], in m's dtype: one product makes
            all three, and one tensor takes their gradients back to it. It may be a part of a wider tensor.
        residual: what comes through where the gate is shut [..., D], in float32 or any other floating dtype no wider
            than the sums'.
        weight: [D, V], as in `torch.nn.functional.linear`; any floating dtype no wider than the sums', as all
            parameters.
        bias: [D] or None.
        gain: of the norm [V]; None leaves the norm out.
        heads: H, which divides V.
        dropout: probability, at least 0 and below 1, rounded to a multiple of 2^-16.
        seed: int64 [] on the device of m, when `dropout` is not 0.
        impl: "auto" (Triton on CUDA for D up to 256, the reference elsewhere and beyond), "triton" (D up to 256; no
            float64, no second derivative) or "reference".

    Returns:
        [..., D] in the dtype of the residual.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; a dropout outside of its range or without a seed; the
            implementation cannot run here.
    """
    options = {"gain": gain, "heads": heads, "dropout": dropout, "seed": seed, "impl": impl}
    return _run(m, mixed, residual, weight, bias, mask=None, moments=False, **options)[0]


def gated_output_with_moments(
    m: Float[Tensor, "... v"],
    mixed: Float[Tensor, "... v_plus_2d"],
    residual: Float[Tensor, "... d"],
    weight: Float[Tensor, "d v"],
    bias: Float[Tensor, " d"] | None = None,
    *,
    mask: Bool[Tensor, "..."] | None = None,
    gain: Float[Tensor, " v"] | None = None,
    heads: int = 1,
    dropout: float = 0.0,
    seed: Int[Tensor, ""] | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "... d"], Moments]:
    """`gated_output` and what a batch norm of its output needs: the kernel that writes the output adds it up.

    Args:
        m: as in `gated_output`.
        mixed: likewise.
        residual: likewise.
        weight: likewise.
        bias: likewise.
        mask: bool [...], True at positions that count for the moments; None for all.
        gain: as in `gated_output`.
        heads: likewise.
        dropout: likewise.
        seed: likewise.
        impl: likewise.

    Returns:
        The output [..., D], and mean and variance [D] of its channels with the number of positions [], in the dtype of
        sums. Gradients flow through mean and variance.

    Raises:
        ValueError: as `gated_output`, or the mask is not bool [...] on the device of m.
    """
    check_counts(mask, "m", m)
    options = {"gain": gain, "heads": heads, "dropout": dropout, "seed": seed, "impl": impl}
    y, moments = _run(m, mixed, residual, weight, bias, mask=mask, moments=True, **options)
    assert moments is not None
    return y, moments


def _run(
    m: Tensor,
    mixed: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    seed: Tensor | None,
    impl: Impl,
    **options: Any,
) -> tuple[Tensor, Moments | None]:
    _check(m, mixed, residual, weight, {"bias": bias, "gain": options["gain"]}, options["heads"])
    if threshold(options["dropout"]):
        check_seed(seed, "m", m)
    else:
        seed = None
    if impl == "auto" and weight.shape[0] > WIDEST:
        impl = "reference"
    if resolve(impl, m.device, "gated_output") == "triton":
        from chela.ops.gated_output import fused

        return fused.gated_output(m, mixed, residual, weight, bias, seed=seed, **options)
    with no_autocast(m.device):
        return reference.gated_output(m, mixed, residual, weight, bias, seed=seed, **options)


def _check(
    m: Tensor, mixed: Tensor, residual: Tensor, weight: Tensor, vectors: dict[str, Tensor | None], heads: int
) -> None:
    if m.dim() < 1:
        raise ValueError("m must be [..., V]; got a single number")
    *rows, v = m.shape
    if weight.dim() != 2 or weight.shape[1] != v or not weight.numel():
        raise ValueError(f"weight must be [D, V] with V = {v}, both at least 1; got {list(weight.shape)}")
    d = weight.shape[0]
    check_shape("mixed", mixed, (*rows, v + 2 * d), "[..., V + 2D]")
    check_shape("residual", residual, (*rows, d), "[..., D]")
    for name, width, legend in (("bias", d, "[D]"), ("gain", v, "[V]")):
        if (vector := vectors[name]) is not None:
            check_shape(name, vector, (width,), legend)
    if heads < 1 or v % heads:
        raise ValueError(f"heads must divide V = {v}; got {heads}")
    check_alike({"m": m, "mixed": mixed}, {"residual": residual, "weight": weight, **vectors})
