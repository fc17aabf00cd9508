"""What `chela bench` measures: for each op its shapes, our implementations and what torch has beside them.

A new implementation or peer is one more `Contender` here. Ours take tensors as the ops do; a peer gets them in the
layout it likes best, and getting there is not timed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from chela.evaluation.bench_peers import FLA_CHUNK, FLA_FUSED, FLASH_FFT, LIGHTNING, OWN_SHAPE, SDPA
from chela.evaluation.bench_suite import Contender, Inputs, Shape, Suite
from chela.ops import (
    linear_attention,
    linear_attention_step,
    long_conv,
    long_conv_online_state,
    long_conv_step,
    short_conv,
    short_conv_step,
)
from chela.ops.impl import Impl
from chela.ops.linear_attention.reference import quadratic
from chela.ops.long_conv.online import OnlineState
from chela.ops.random_inputs import draw, linear_attention_inputs, long_conv_inputs, short_conv_inputs
from chela.ops.short_conv import reference

IMPLS: tuple[Impl, ...] = ("triton", "reference")


def _ours(run: Callable[..., Tensor], name: str = "chela {}", longest_plain: int = 131_072) -> tuple[Contender, ...]:
    """Our implementations, the reference on a GPU up to a length."""

    def bound(impl: Impl) -> Callable[..., Tensor]:
        return lambda **inputs: run(**inputs, impl=impl)

    def longest(impl: Impl) -> Callable[[str], int]:
        return lambda device: longest_plain if impl == "reference" and device == "cuda" else 2**62

    return tuple(Contender(name.format(impl), bound(impl), impl=impl, longest=longest(impl)) for impl in IMPLS)


def _lengths(base: Shape, lengths: Sequence[int], tokens: int = 0) -> tuple[Shape, ...]:
    """The same sizes at several lengths; with `tokens`, the batch shrinks as the length grows."""
    return tuple({**base, "B": max(tokens // t, 1) if tokens else base["B"], "T": t} for t in lengths)


CPU_LENGTHS = (128, 512, 2048, 8192, 16_384)
GPU_LENGTHS = (512, 2048, 8192, 16_384, 131_072)
ATTENTION_LENGTHS = (128, 512, 2048, 8192, 16_384, 32_768, 65_536, 131_072, 262_144, 524_288, 1_048_576)
GPU_TOKENS = 131_072


def _attend(q: Tensor, k: Tensor, v: Tensor, impl: Impl) -> Tensor:
    return linear_attention(q, k, v, impl=impl)[0]


ATTENTION = Suite(
    op="linear-attention",
    uses=("linear_attention",),
    make=lambda s, **options: linear_attention_inputs(s["B"], s["T"], s["H"], s["K"], s["V"], **options),
    plain=lambda q, k, v: quadratic(q, k, v)[0],
    contenders=(
        *_ours(_attend),
        SDPA,
        FLA_CHUNK,
        FLA_FUSED,
        LIGHTNING,
    ),
    shapes={
        "cpu": _lengths({"B": 1, "T": 0, "H": 4, "K": 64, "V": 64}, CPU_LENGTHS),
        "cuda": (
            *_lengths({"B": 0, "T": 0, "H": 8, "K": 64, "V": 64}, ATTENTION_LENGTHS, GPU_TOKENS),
            *_lengths(OWN_SHAPE, (128, 2048, 16_384, 131_072, 1_048_576), GPU_TOKENS),
        ),
    },
    check={"B": 2, "T": 333, "H": 3, "K": 24, "V": 40},
)

ATTENTION_FLAT = replace(
    ATTENTION,
    op="linear-attention, B x T constant",
    contenders=_ours(_attend, longest_plain=0),  # so many tokens would not fit into a GPU with the reference
    shapes={
        "cpu": _lengths({"B": 0, "T": 0, "H": 4, "K": 64, "V": 64}, CPU_LENGTHS, 16_384),
        "cuda": _lengths({"B": 0, "T": 0, "H": 8, "K": 64, "V": 64}, [2**n for n in range(14, 21)], 2**20),
    },
    flat=True,
)


def _conv1d(x: Tensor, weight: Tensor) -> Tensor:
    """Causal depthwise convolution, x [B, D, T], last tap of weight [D, W] = current step."""
    return F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight.unsqueeze(1), groups=x.shape[1])


def _fft(x: Tensor, kernel: Tensor) -> Tensor:
    """The usual recipe, in float32 at least: x [B, D, T], kernel [D, L]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    size = x.shape[2] + kernel.shape[1]
    spectrum = torch.fft.rfft(x.to(wide), n=size) * torch.fft.rfft(kernel.to(wide), n=size)
    return torch.fft.irfft(spectrum, n=size)[..., : x.shape[2]].to(x.dtype)


SHORT = Suite(
    op="short-conv",
    uses=("short_conv",),
    make=lambda s, **options: short_conv_inputs(s["B"], s["T"], s["D"], s["W"], bias=False, **options),
    plain=lambda x, weight: F.silu(reference.plain(F.pad(x, (0, 0, weight.shape[1] - 1, 0)), weight, None)),
    contenders=(
        *_ours(lambda x, weight, impl: short_conv(x, weight, activation="silu", impl=impl)[0]),
        Contender(
            "torch conv1d, silu",
            lambda x, weight: F.silu(_conv1d(x, weight)),
            prepare=lambda inputs, shape: {
                "x": inputs["x"].transpose(1, 2).contiguous(),
                "weight": inputs["weight"].to(inputs["x"].dtype),
            },
        ),
    ),
    shapes={
        "cpu": _lengths({"B": 4, "T": 0, "D": 128, "W": 4}, CPU_LENGTHS),
        "cuda": _lengths({"B": 0, "T": 0, "D": 128, "W": 4}, GPU_LENGTHS, GPU_TOKENS),
    },
    check={"B": 2, "T": 333, "D": 24, "W": 4},
)

LONG = Suite(
    op="long-conv",
    uses=("long_conv",),
    make=lambda s, **options: long_conv_inputs(s["B"], s["T"], s["D"], s["L"], **options),
    plain=lambda x, kernel: _fft(x.transpose(1, 2), kernel).transpose(1, 2),
    contenders=(
        *_ours(lambda x, kernel, impl: long_conv(x, kernel, impl=impl)[0]),
        Contender(
            "torch fft",
            _fft,
            prepare=lambda inputs, shape: {"x": inputs["x"].transpose(1, 2).contiguous(), "kernel": inputs["kernel"]},
        ),
        Contender(
            "torch conv1d",
            _conv1d,
            prepare=lambda inputs, shape: {
                "x": inputs["x"].transpose(1, 2).contiguous(),
                "weight": inputs["kernel"].flip(1).to(inputs["x"].dtype),
            },
            longest=lambda device: 512,
        ),
        FLASH_FFT,
    ),
    shapes={
        "cpu": tuple({**s, "L": s["T"]} for s in _lengths({"B": 1, "T": 0, "D": 128}, CPU_LENGTHS)),
        "cuda": tuple(
            {**s, "L": s["T"]}
            for s in (
                *_lengths({"B": 0, "T": 0, "D": 128}, [2**n for n in range(9, 18)], GPU_TOKENS),
                {"B": 1, "T": 2**18, "D": 64},  # channels as memory allows, for the peers
                {"B": 1, "T": 2**20, "D": 32},
            )
        ),
    },
    check={"B": 2, "T": 333, "D": 24, "L": 333},
)


# Decoding: one more token after a context of T. The attention keeps K x V numbers a head whatever T; a softmax
# attention keeps T keys and values, and the long convolution its last T inputs, with a kernel of as many taps.


def _one_token(s: Shape, **options: Any) -> Inputs:
    inputs = linear_attention_inputs(s["B"], 1, s["H"], s["K"], s["K"], state=True, **options)
    return {name: x if name == "state" else x.squeeze(1) for name, x in inputs.items()}


def _with_cache(inputs: Inputs, shape: Shape) -> Inputs:
    """A query [B, H, 1, K], and keys and values of T tokens [B, H, T, K]."""
    q = inputs["q"]
    sizes = (len(q), q.shape[1], shape["T"], q.shape[2])
    keys, values = (draw(*sizes, seed=seed, dtype=q.dtype, device=q.device, on_device=True) for seed in (1, 2))
    return {"query": q.unsqueeze(2), "key": keys, "value": values}


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
    after = state + torch.einsum("bhk,bhv->bhkv", k, v)
    return torch.einsum("bhk,bhkv->bhv", q.to(after.dtype), after).to(q.dtype)


def _one_input(s: Shape, **options: Any) -> Inputs:
    short = short_conv_inputs(s["B"], 1, s["D"], 4, bias=False, state=True, **options)
    long = long_conv_inputs(s["B"], 1, s["D"], s["T"], state=s["T"] - 1, seed=10, **options)
    inputs = {"x": short["x"].squeeze(1), "weight": short["weight"], "short": short["state"]}
    return inputs | {"kernel": long["kernel"], "long": long["state"]}


def _convolve(x: Tensor, weight: Tensor, short: Tensor, kernel: Tensor, long: Tensor, impl: Impl) -> Tensor:
    u, _ = short_conv_step(x, weight, state=short, activation="silu", impl=impl)
    return long_conv_step(u, kernel, state=long, impl=impl)[0]


def _convolve_plainly(x: Tensor, weight: Tensor, short: Tensor, kernel: Tensor, long: Tensor) -> Tensor:
    u = F.silu(torch.einsum("bwd,dw->bd", torch.cat([short, x.unsqueeze(1)], 1), weight.to(x.dtype)))
    return torch.einsum("bld,dl->bd", torch.cat([long, u.unsqueeze(1)], 1), kernel.flip(1).to(x.dtype))


DECODE_ATTENTION = Suite(
    op="decode, linear attention",
    uses=("linear_attention",),
    make=_one_token,
    plain=_attend_plainly,
    contenders=(
        *_ours(lambda q, k, v, state, impl: linear_attention_step(q, k, v, state, impl=impl)[0]),
        Contender("torch SDPA, cache", F.scaled_dot_product_attention, prepare=_with_cache),
    ),
    shapes={
        "cpu": _lengths({"B": 1, "T": 0, "H": 4, "K": 64}, CPU_LENGTHS),
        "cuda": _lengths({"B": 8, "T": 0, "H": 8, "K": 64}, GPU_LENGTHS),
    },
    check={"B": 2, "T": 333, "H": 3, "K": 24},
    backward=False,
    floor=False,
    tokens=lambda shape: shape["B"],
)

DECODE_CONVOLUTIONS = Suite(
    op="decode, short and long convolution",
    uses=("short_conv", "long_conv"),
    make=_one_input,
    plain=_convolve_plainly,
    contenders=_ours(_convolve),
    shapes={
        "cpu": _lengths({"B": 1, "T": 0, "D": 256}, CPU_LENGTHS),
        "cuda": _lengths({"B": 8, "T": 0, "D": 512}, GPU_LENGTHS),
    },
    check={"B": 2, "T": 333, "D": 24},
    backward=False,
    floor=False,
    tokens=lambda shape: shape["B"],
)


def _tokens(s: Shape, **options: Any) -> Inputs:
    inputs = long_conv_inputs(s["B"], s["N"], s["D"], s["T"], state=s["T"] - 1, **options)
    return {name: inputs[name] for name in ("x", "kernel", "state")}


def _decode(x: Tensor, kernel: Tensor, state: Tensor | OnlineState, impl: Impl) -> Tensor:
    outs = []
    for token in x.unbind(1):
        out, state = long_conv_step(token, kernel, state=state, impl=impl)
        outs.append(out)
    return torch.stack(outs, 1)


def _decode_online(x: Tensor, kernel: Tensor, state: Tensor, impl: Impl) -> Tensor:
    return _decode(x, kernel, long_conv_online_state(state, kernel), impl)


DECODE_ONLINE = Suite(
    op="decode, long convolution",
    uses=("long_conv",),
    make=_tokens,
    plain=lambda x, kernel, state: _fft(torch.cat([state, x], 1).mT, kernel).mT[:, state.shape[1] :],
    contenders=(
        *_ours(_decode_online, "chela {}, online"),
        Contender(
            "chela, dot product",
            lambda x, kernel, state: _decode(x, kernel, state, "reference"),
            prepare=lambda inputs, shape: inputs | {"x": inputs["x"][:, :4]},  # its tokens all cost the same
            impl="reference",
        ),
    ),
    shapes={
        "cpu": tuple({"B": 1, "T": t, "D": 256, "N": 4096} for t in (1024, 4096, 16_384, 65_536)),
        "cuda": tuple({"B": 1, "T": t, "D": 1024, "N": 4096} for t in (4096, 16_384, 131_072, 1_048_576)),
    },
    check={"B": 2, "T": 333, "D": 24, "N": 600},
    gradients=False,
    backward=False,
    floor=False,
    tokens=lambda shape: shape["B"],
    steps=lambda out: out.shape[1],
)
"""N tokens one by one, the beginning of the online state included, after T inputs within reach; time of one token."""

SUITES = {
    "linear-attention": (ATTENTION, ATTENTION_FLAT),
    "short-conv": (SHORT,),
    "long-conv": (LONG,),
    "decode": (DECODE_ATTENTION, DECODE_CONVOLUTIONS, DECODE_ONLINE),
}
"""What each name on the command line stands for."""
