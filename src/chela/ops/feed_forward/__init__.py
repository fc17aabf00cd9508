"""The feed-forward part of a block: norm, product, SiLU, product, residual, with dropout after both products."""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chela.ops.checks import check_alike, check_shape
from chela.ops.dropout import check_seed, threshold
from chela.ops.feed_forward import reference
from chela.ops.impl import Impl, resolve
from chela.ops.launch import roomy
from chela.ops.precision import no_autocast, product_dtype

Norm = Literal["layer", "rms", "scale", "batch", "none"]

NEEDS = {
    "gain": ("layer", "rms", "scale", "batch"),
    "shift": ("layer", "batch"),
    "mean": ("batch",),
    "rstd": ("batch",),
}
"""What a norm is given, and which norms."""


def widest(dtype: torch.dtype, device: torch.device, *, gated: bool) -> int:
    """Most channels D that the Triton kernels take with products of `dtype`: a row must fit on chip; F need not."""
    if roomy(device):
        return 128 if dtype == torch.float32 else 256
    return 128 if dtype != torch.float32 else 0 if gated else 64


def fits(x: Tensor, *, gated: bool = False) -> bool:
    """Whether the Triton kernels take rows as wide as those of x [..., D], on its device."""
    return x.shape[-1] <= widest(product_dtype(x), x.device, gated=gated)


def feed_forward(
    x: Float[Tensor, "... d"],
    w1: Float[Tensor, "f d"],
    b1: Float[Tensor, " f"] | None,
    w2: Float[Tensor, "d f"],
    b2: Float[Tensor, " d"] | None,
    *,
    w3: Float[Tensor, "f d"] | None = None,
    bounded: bool = False,
    norm: Norm = "none",
    gain: Float[Tensor, " d_or_1"] | None = None,
    shift: Float[Tensor, " d"] | None = None,
    mean: Float[Tensor, " d"] | None = None,
    rstd: Float[Tensor, " d"] | None = None,
    residual: Float[Tensor, "... d"] | None = None,
    dropout: float = 0.0,
    seed: Int[Tensor, ""] | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "... d"]:
    """Compute `residual + drop(W2 drop(silu(W1 norm(x) + b1)) + b2)` for every position.

    With a third matrix the hidden products are gated (SwiGLU, Shazeer 2020): `silu(W1 norm(x) + b1) * W3 norm(x)`.
    Bounded, the second factor is the tanh of that.

    The norm, with e the mean over D and sums in float32 (float64 for float64):

        layer   (x - e[x]) / sqrt(e[(x - e[x])^2] + 1e-5) * gain + shift
        rms     x / sqrt(e[x^2] + 1e-6) * gain
        scale   the same with one gain for all channels
        batch   (x - mean) rstd gain + shift, the statistics given, with gradients of their own
        none    x

    The products take their inputs in autocast's dtype where autocast is on for the device, otherwise in that of x,
    and sum in float32. Both dropouts are `chela.ops.dropout`'s, of streams 0 and 1 of the seed, so that the same seed
    drops the same entries on every device and in every implementation.

    Args:
        x: input [..., D].
        w1: weight [F, D] of the first product; any floating dtype no wider than the sums', as all parameters.
        b1: its bias [F]; None for none.
        w2: weight [D, F] of the second.
        b2: its bias [D]; None for none.
        w3: weight [F, D] of the product that SiLU's is multiplied by; None leaves it out.
        bounded: multiply by the tanh of that product.
        norm: "layer", "rms", "scale", "batch", or "none" for an x that is normed already or not at all.
        gain: [D] ("scale": [1]), with every norm but "none".
        shift: [D], with norms "layer" and "batch".
        mean: [D], with norm "batch".
        rstd: [D], the inverse of the standard deviation, with norm "batch"; above 0.
        residual: what is added [..., D], in any floating dtype; x when left out.
        dropout: probability, at least 0 and below 1, rounded to a multiple of 2^-16.
        seed: int64 [] on the device of x, when `dropout` is not 0.
        impl: "auto" (Triton on CUDA, the reference elsewhere and for rows too wide for Triton), "triton" (D up to
            `widest`: 256 with products of 16 bits and 128 in float32 on an H100, less on GPUs with less shared memory;
            no float64, no second derivative) or "reference".

    Returns:
        [..., D] in the dtype of the residual.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; a norm without its parameters or with others; a dropout
            outside of its range or without a seed; the implementation cannot run here.
    """
    vectors = {"gain": gain, "shift": shift, "mean": mean, "rstd": rstd}
    if bounded and w3 is None:
        raise ValueError("bounded is about the product with w3: give w3, or leave bounded out")
    _check(x, w1, {"b1": b1, "w2": w2, "b2": b2, "w3": w3}, norm, vectors, residual)
    b1 = w1.new_zeros(w1.shape[0]) if b1 is None else b1
    b2 = w1.new_zeros(w1.shape[1]) if b2 is None else b2
    if threshold(dropout):
        check_seed(seed, "x", x)
    else:
        seed = None
    options: dict[str, Any] = {
        "w3": w3,
        "bounded": bounded,
        "norm": norm,
        **vectors,
        "residual": x if residual is None else residual,
        "dropout": dropout,
        "seed": seed,
        "dtype": product_dtype(x),
    }
    if impl == "auto" and not fits(x, gated=w3 is not None):
        impl = "reference"
    if resolve(impl, x.device, "feed_forward") == "triton":
        from chela.ops.feed_forward import fused

        return fused.feed_forward(x, w1, b1, w2, b2, **options | {"residual": residual})
    with no_autocast(x.device):
        return reference.feed_forward(x, w1, b1, w2, b2, **options)


def _check(
    x: Tensor,
    w1: Tensor,
    others: dict[str, Tensor | None],
    norm: str,
    vectors: dict[str, Tensor | None],
    residual: Tensor | None,
) -> None:
    if x.dim() < 1:
        raise ValueError("x must be [..., D]; got a single number")
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}; got {norm!r}")
    d = x.shape[-1]
    if w1.dim() != 2 or w1.shape[1] != d or not w1.numel():
        raise ValueError(f"w1 must be [F, D] with D = {d}, both at least 1; got {list(w1.shape)}")
    f = w1.shape[0]
    shapes = {"b1": ((f,), "[F]"), "w2": ((d, f), "[D, F]"), "b2": ((d,), "[D]"), "w3": ((f, d), "[F, D]")}
    for name, tensor in others.items():
        if tensor is not None:
            check_shape(name, tensor, *shapes[name])
    for name, tensor in vectors.items():
        if (tensor is not None) != (norm in NEEDS[name]):
            raise ValueError(f"norm {norm!r} {'needs' if tensor is None else 'takes no'} {name}")
        if tensor is not None:
            one = name == "gain" and norm == "scale"
            check_shape(name, tensor, (1,) if one else (d,), "[1]" if one else "[D]")
    check_alike({"x": x}, {"w1": w1} | others | vectors | {"residual": residual})
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape), "[..., D]")
