"""Random inputs for the ops' tests, self-test and benchmarks: the same numbers on every machine and in every dtype."""

from typing import Any, Literal

import torch
from torch import Tensor

Layout = Literal["contiguous", "sliced", "transposed"]


def draw(
    *shape: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: Layout = "contiguous",
    on_device: bool = False,
) -> Tensor:
    """Draw standard normal numbers, the same for every dtype, device and layout up to rounding.

    Args:
        shape: of the tensor.
        seed: of a generator of its own.
        dtype: rounded to, from float64.
        device: moved to, from the CPU.
        layout: "sliced" is a part of a wider tensor (the last axis still has stride 1), as after splitting a
            projection; in "transposed" the last axis does not have stride 1.
        on_device: draw on the device itself, which for large tensors is far quicker, and other numbers on each kind.

    Returns:
        The tensor, a leaf that requires no gradient.
    """
    source, kind = (device, torch.float32) if on_device else ("cpu", torch.float64)
    values = torch.randn(shape, dtype=kind, device=source, generator=torch.Generator(source).manual_seed(seed))
    values = values.to(dtype).to(device)
    if layout == "sliced":
        return torch.cat([values, values], dim=-1)[..., shape[-1] :]
    if layout == "transposed":
        return values.mT.contiguous().mT
    return values


def linear_attention_inputs(
    b: int,
    t: int,
    h: int,
    k: int,
    v: int,
    *,
    decay: bool = False,
    state: bool = False,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Draw q, k [B, T, H, K], v [B, T, H, V] and, asked for, decay [H] and state [B, H, K, V].

    Queries are scaled by K^-0.5, so that scores have unit variance. Decays lie between 0.5 and 1, the last being 1.
    `options` are those of `draw`; decay and state are contiguous, float32 (float64 for float64).
    """
    device, wide = _device_and_wide(options)
    inputs: dict[str, Any] = {
        "q": draw(b, t, h, k, seed=seed, **options) * k**-0.5,
        "k": draw(b, t, h, k, seed=seed + 1, **options),
        "v": draw(b, t, h, v, seed=seed + 2, **options),
    }
    if decay:
        inputs["decay"] = 1 - 0.5 * torch.linspace(1, 0, h, dtype=wide, device=device) ** 2
    if state:
        inputs["state"] = draw(b, h, k, v, seed=seed + 3, dtype=wide, device=device)
    return inputs


def short_conv_inputs(
    b: int, t: int, d: int, w: int, *, bias: bool = True, state: bool = False, seed: int = 0, **options: Any
) -> dict[str, Any]:
    """Draw x [B, T, D], weight [D, W] of unit energy and, asked for, bias [D] and state [B, W-1, D].

    `options` are those of `draw`; weight and bias are contiguous, float32 (float64 for float64).
    """
    device, wide = _device_and_wide(options)
    inputs: dict[str, Any] = {
        "x": draw(b, t, d, seed=seed, **options),
        "weight": draw(d, w, seed=seed + 1, dtype=wide, device=device) * w**-0.5,
    }
    if bias:
        inputs["bias"] = draw(d, seed=seed + 2, dtype=wide, device=device)
    if state:
        inputs["state"] = draw(b, w - 1, d, seed=seed + 3, **options)
    return inputs


def long_conv_inputs(
    b: int,
    t: int,
    d: int,
    lags: int,
    *,
    reverse: int | None = None,
    state: int | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Draw x [B, T, D], kernel [D, L] of unit energy and, asked for, reverse_kernel [D, reverse] and state [B, S, D].

    `options` are those of `draw`; kernels are contiguous, float32 (float64 for float64).
    """
    device, wide = _device_and_wide(options)
    energy = lags + (reverse or 0)
    inputs: dict[str, Any] = {
        "x": draw(b, t, d, seed=seed, **options),
        "kernel": draw(d, lags, seed=seed + 1, dtype=wide, device=device) * energy**-0.5,
    }
    if reverse is not None:
        inputs["reverse_kernel"] = draw(d, reverse, seed=seed + 2, dtype=wide, device=device) * energy**-0.5
    if state is not None:
        inputs["state"] = draw(b, state, d, seed=seed + 3, **options)
    return inputs


def feed_forward_inputs(
    *rows: int,
    d: int,
    f: int,
    norm: str = "layer",
    gated: bool = False,
    residual: bool = False,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Draw x [*rows, D], w1 [F, D], b1 [F], w2 [D, F], b2 [D], the norm's parameters and, asked for, w3 and a residual.

    `options` are those of `draw`, for x and the residual; the others are contiguous, float32 (float64 for float64).
    """
    device, wide = _device_and_wide(options)
    parameter = {"dtype": wide, "device": device}
    inputs: dict[str, Any] = {
        "x": draw(*rows, d, seed=seed, **options),
        "w1": draw(f, d, seed=seed + 1, **parameter) * d**-0.5,
        "b1": draw(f, seed=seed + 2, **parameter) * 0.3,
        "w2": draw(d, f, seed=seed + 3, **parameter) * f**-0.5,
        "b2": draw(d, seed=seed + 4, **parameter) * 0.3,
    }
    if gated:
        inputs["w3"] = draw(f, d, seed=seed + 10, **parameter) * d**-0.5
    if norm != "none":
        inputs["gain"] = 1 + 0.3 * draw(1 if norm == "scale" else d, seed=seed + 5, **parameter)
    if norm in ("layer", "batch"):
        inputs["shift"] = draw(d, seed=seed + 6, **parameter) * 0.3
    if norm == "batch":
        inputs["mean"] = draw(d, seed=seed + 8, **parameter)
        inputs["rstd"] = torch.exp(0.3 * draw(d, seed=seed + 9, **parameter))
    if residual:
        inputs["residual"] = draw(*rows, d, seed=seed + 7, **options)
    return inputs


def batch_norm_inputs(*rows: int, d: int, seed: int = 0, **options: Any) -> dict[str, Any]:
    """Draw x [*rows, D], away from zero, with weight and bias [D].

    `options` are those of `draw`, for x; the others are contiguous, float32 (float64 for float64).
    """
    device, wide = _device_and_wide(options)
    parameter = {"dtype": wide, "device": device}
    return {
        "x": 3 + draw(*rows, d, seed=seed, **options),
        "weight": 1 + 0.3 * draw(d, seed=seed + 1, **parameter),
        "bias": draw(d, seed=seed + 2, **parameter) * 0.3,
    }


def gated_output_inputs(
    *rows: int,
    d: int,
    v: int,
    bias: bool = True,
    gain: bool = True,
    residual_dtype: torch.dtype | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Draw m [*rows, V], mixed [*rows, V + 2D], residual [*rows, D], weight [D, V], asked for, bias [D] and gain [V].

    `options` are those of `draw`, for the first three; the others are contiguous, float32 (float64 for float64).
    """
    device, wide = _device_and_wide(options)
    parameter = {"dtype": wide, "device": device}
    inputs: dict[str, Any] = {
        "m": draw(*rows, v, seed=seed, **options),
        "mixed": draw(*rows, v + 2 * d, seed=seed + 1, **options),
        "residual": draw(*rows, d, seed=seed + 2, **options),
        "weight": draw(d, v, seed=seed + 3, **parameter) * v**-0.5,
    }
    if bias:
        inputs["bias"] = draw(d, seed=seed + 4, **parameter) * 0.3
    if gain:
        inputs["gain"] = 1 + 0.3 * draw(v, seed=seed + 5, **parameter)
    if residual_dtype:
        inputs["residual"] = inputs["residual"].to(residual_dtype)
    return inputs


def _device_and_wide(options: dict[str, Any]) -> tuple[torch.device | str, torch.dtype]:
    dtype = options.get("dtype", torch.float32)
    return options.get("device", "cpu"), torch.float64 if dtype == torch.float64 else torch.float32
