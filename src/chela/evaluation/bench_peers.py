"""Others who do an op's job, or what it stands in for: torch's softmax attention and packages.

None is needed, and none is imported before it runs. A peer gets its inputs in the layout it likes best.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from chela.evaluation.bench_suite import Contender, Inputs, Shape

OWN_SHAPE: Shape = {"B": 64, "T": 2048, "H": 1, "K": 64, "V": 256}
"""A CHELA layer's own: one head with wide values."""

FEW: tuple[Shape, ...] = (
    {"B": 64, "T": 2048, "H": 8, "K": 64, "V": 64},
    {"B": 8, "T": 16_384, "H": 8, "K": 64, "V": 64},
    {"B": 1, "T": 131_072, "H": 8, "K": 64, "V": 64},
    OWN_SHAPE,
)
"""Shapes for peers that spend a minute on tuning themselves to each new one."""


def _heads_first(inputs: Inputs, shape: Shape) -> Inputs:
    """From [B, T, H, .] to [B, H, T, .]."""
    return {name: x.transpose(1, 2).contiguous() for name, x in inputs.items()}


def _fla_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fla.ops.linear_attn import chunk_linear_attn  # pyrefly: ignore

    return chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0]


def _fla_fused_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fla.ops.linear_attn import fused_chunk_linear_attn  # pyrefly: ignore

    return fused_chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0]


def _lightning(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from lightning_attn.ops.triton import lightning_attn2_no_decay  # pyrefly: ignore

    return lightning_attn2_no_decay(q, k, v)


@functools.lru_cache(maxsize=1)
def _flash_fft(length: int, dtype: torch.dtype, device: torch.device) -> Any:
    """FlashFFTConv of rows of that length, with what it keeps for them."""
    from flashfftconv import FlashFFTConv  # pyrefly: ignore

    return FlashFFTConv(2 * length, dtype=dtype).to(device)


SDPA = Contender(
    "torch SDPA, softmax",
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    prepare=_heads_first,
    longest=lambda device: 2048 if device == "cpu" else 16_384,
)
FLA_CHUNK = Contender("fla, chunk", _fla_chunk, only=FEW, package="fla")
FLA_FUSED = Contender("fla, fused chunk", _fla_fused_chunk, only=FEW, package="fla")
LIGHTNING = Contender(
    "lightning attention",
    _lightning,
    prepare=_heads_first,
    longest=lambda device: 131_072 if device == "cuda" else 0,
    package="lightning_attn",
)
FLASH_FFT = Contender(
    "FlashFFTConv",
    lambda x, kernel: _flash_fft(x.shape[2], x.dtype, x.device)(x, kernel),
    prepare=lambda inputs, shape: {"x": inputs["x"].transpose(1, 2).contiguous(), "kernel": inputs["kernel"].float()},
    longest=lambda device: 2**21 if device == "cuda" else 0,
    package="flashfftconv",
)
