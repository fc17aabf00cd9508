"""What `chela bench` measures: for each op its shapes, our implementations and what torch has beside them.

A new implementation or peer is one more `Contender` here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from chela.ops import (
    linear_attention,
    linear_attention_step,
    long_conv,
    long_conv_step,
    short_conv,
    short_conv_step,
)

Shape = dict[str, int]
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Contender:
    """One way to do a job."""

    name: str
    run: Callable[..., Tensor]
    """From the tensors of `prepare` to the output."""
    prepare: Callable[[Tensors], Tensors] = lambda tensors: tensors
    """Puts the suite's inputs into this contender's own layout; not timed."""
    impl: str = ""
    """Which implementation of ours; empty for a peer."""
    longest: Callable[[str], int] = lambda device: 2**62
    """Largest T worth waiting for on a kind of device."""


@dataclass(frozen=True)
class Suite:
    """One op."""

    op: str
    uses: tuple[str, ...]
    """Ops of ours that it calls."""
    make: Callable[[Shape, torch.dtype, torch.device], Tensors]
    """Random inputs of a shape; gradients are taken with respect to all of them."""
    contenders: tuple[Contender, ...]
    shapes: dict[str, tuple[Shape, ...]]
    """For each kind of device."""
    check: Shape
    """A small, odd shape, on which our implementations are held to float64 before anything is timed."""
    backward: bool = True
    tokens: Callable[[Shape], int] = lambda shape: shape["B"] * shape["T"]


def _ours(run: Callable[..., Tensor]) -> tuple[Contender, ...]:
    def bound(impl: str) -> Callable[..., Tensor]:
        return lambda *tensors: run(*tensors, impl=impl)

    return tuple(Contender(f"chela {impl}", bound(impl), impl=impl) for impl in ("triton", "reference"))


def _draw(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator) * scale).to(device, dtype)

    return draw


def _lengths(base: Shape, lengths: Sequence[int], tokens: int = 0) -> tuple[Shape, ...]:
    """The same sizes at several lengths; with `tokens`, the batch shrinks as the length grows."""
    return tuple({**base, "B": max(tokens // t, 1) if tokens else base["B"], "T": t} for t in lengths)


CPU_LENGTHS = (128, 512, 2048, 8192, 16_384)
GPU_LENGTHS = (512, 2048, 8192, 16_384, 131_072)


# Attention


def _make_attention(s: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    draw = _draw(device, dtype)
    width = s["K"] ** -0.5
    return (
        draw(s["B"], s["T"], s["H"], s["K"], scale=width),
        draw(s["B"], s["T"], s["H"], s["K"], scale=width),
        draw(s["B"], s["T"], s["H"], s["V"]),
    )


def _heads_first(tensors: Tensors) -> Tensors:
    return tuple(x.transpose(1, 2).contiguous() for x in tensors)


ATTENTION = Suite(
    op="linear-attention",
    uses=("linear_attention",),
    make=_make_attention,
    contenders=(
        *_ours(lambda q, k, v, impl: linear_attention(q, k, v, impl=impl)[0]),
        Contender(
            "torch SDPA (softmax)",
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            prepare=_heads_first,
            longest=lambda device: 2048 if device == "cpu" else 32_768,
        ),
    ),
    shapes={
        "cpu": _lengths({"B": 1, "T": 0, "H": 4, "K": 64, "V": 64}, CPU_LENGTHS),
        "cuda": (
            *_lengths({"B": 0, "T": 0, "H": 8, "K": 64, "V": 64}, GPU_LENGTHS, 131_072),
            {"B": 64, "T": 2048, "H": 1, "K": 64, "V": 256},
        ),
    },
    check={"B": 2, "T": 333, "H": 3, "K": 24, "V": 40},
)


# Convolutions


def _make_short(s: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    draw = _draw(device, dtype)
    return draw(s["B"], s["T"], s["D"]), draw(s["D"], s["W"], scale=s["W"] ** -0.5)


def _make_long(s: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    draw = _draw(device, dtype)
    return draw(s["B"], s["T"], s["D"]), draw(s["D"], s["L"], scale=s["L"] ** -0.5)


def _channels_first(tensors: Tensors) -> Tensors:
    x, weight = tensors
    return x.transpose(1, 2).contiguous(), weight


def _conv1d(x: Tensor, weight: Tensor) -> Tensor:
    """Causal depthwise convolution, x [B, D, T], last tap of weight [D, W] = current step."""
    return F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight.unsqueeze(1), groups=x.shape[1])


def _flipped(tensors: Tensors) -> Tensors:
    x, kernel = _channels_first(tensors)
    return x, kernel.flip(1).contiguous()


def _fft(x: Tensor, kernel: Tensor) -> Tensor:
    """The usual recipe in float32: x [B, D, T], kernel [D, L]."""
    t, size = x.shape[2], x.shape[2] + kernel.shape[1]
    spectrum = torch.fft.rfft(x.float(), n=size) * torch.fft.rfft(kernel.float(), n=size)
    return torch.fft.irfft(spectrum, n=size)[..., :t].to(x.dtype)


SHORT = Suite(
    op="short-conv",
    uses=("short_conv",),
    make=_make_short,
    contenders=(
        *_ours(lambda x, weight, impl: short_conv(x, weight, activation="silu", impl=impl)[0]),
        Contender("torch conv1d + silu", lambda x, weight: F.silu(_conv1d(x, weight)), prepare=_channels_first),
    ),
    shapes={
        "cpu": _lengths({"B": 4, "T": 0, "D": 128, "W": 4}, CPU_LENGTHS),
        "cuda": _lengths({"B": 0, "T": 0, "D": 128, "W": 4}, GPU_LENGTHS, 131_072),
    },
    check={"B": 2, "T": 333, "D": 24, "W": 4},
)

LONG = Suite(
    op="long-conv",
    uses=("long_conv",),
    make=_make_long,
    contenders=(
        *_ours(lambda x, kernel, impl: long_conv(x, kernel, impl=impl)[0]),
        Contender("torch fft", _fft, prepare=_channels_first),
        Contender("torch conv1d", _conv1d, prepare=_flipped, longest=lambda device: 512),
    ),
    shapes={
        "cpu": tuple({**s, "L": s["T"]} for s in _lengths({"B": 1, "T": 0, "D": 128}, CPU_LENGTHS)),
        "cuda": tuple({**s, "L": s["T"]} for s in _lengths({"B": 0, "T": 0, "D": 128}, GPU_LENGTHS, 131_072)),
    },
    check={"B": 2, "T": 333, "D": 24, "L": 333},
)


# Decoding: one token of one layer's mixing after a context of T


def _make_decode(s: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    draw = _draw(device, dtype)
    width = s["H"] * s["K"]
    heads = (s["B"], s["H"], s["K"])
    state = draw(s["B"], s["H"], s["K"], s["K"]).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return (
        draw(s["B"], width),
        draw(width, 4, scale=0.5),
        draw(width, s["T"], scale=s["T"] ** -0.5),
        draw(s["B"], 3, width),
        draw(s["B"], s["T"] - 1, width),
        *(draw(*heads, scale=s["K"] ** -0.5) for _ in range(3)),
        state,
    )


def _step(x: Tensor, weight: Tensor, kernel: Tensor, short: Tensor, long: Tensor, *rest: Tensor, impl: str) -> Tensor:
    q, k, v, state = rest
    u, _ = short_conv_step(x, weight, state=short, activation="silu", impl=impl)  # pyrefly: ignore
    z, _ = long_conv_step(u, kernel, state=long, impl=impl)  # pyrefly: ignore
    out, _ = linear_attention_step(q, k, v, state, impl=impl)  # pyrefly: ignore
    return out.flatten(1) + z


def _caches(tensors: Tensors) -> Tensors:
    """A query and the keys and values of T tokens, [B, H, T, K]."""
    cache, q = tensors[4], tensors[5]
    keys = F.pad(cache, (0, 0, 1, 0)).unflatten(2, q.shape[1:]).transpose(1, 2).contiguous()
    return q.unsqueeze(2), keys, keys.clone()


DECODE = Suite(
    op="decode",
    uses=("short_conv", "long_conv", "linear_attention"),
    make=_make_decode,
    contenders=(
        *_ours(_step),
        Contender("torch SDPA (softmax) with a cache", F.scaled_dot_product_attention, prepare=_caches),
    ),
    shapes={
        "cpu": _lengths({"B": 1, "T": 0, "H": 4, "K": 64}, CPU_LENGTHS),
        "cuda": _lengths({"B": 8, "T": 0, "H": 8, "K": 64}, GPU_LENGTHS),
    },
    check={"B": 2, "T": 333, "H": 3, "K": 24},
    backward=False,
    tokens=lambda shape: shape["B"],
)

SUITES = {suite.op: suite for suite in (ATTENTION, SHORT, LONG, DECODE)}
