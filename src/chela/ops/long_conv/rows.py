"""Rows of one sequence a channel, and factors of the transforms on the circle z^N = i, for the methods that use both.

Row (d, b) of [D, B, N] is channel d of batch b: N times, of which the last may be zeros.
"""

import math

import torch
from torch import Tensor

from chela.ops.launch import ceil
from chela.ops.long_conv import kernels
from chela.ops.long_conv.history import BLOCK

CHANNELS = 64
"""Channels in a tile of the passes that transpose, `BLOCK` times long."""


def to_rows(x: Tensor, front: int, n: int) -> Tensor:
    """[B, T, D] -> [D, B, N], `front` zeros before it and zeros behind; N is a multiple of 128."""
    out = x.new_empty(x.shape[2], x.shape[0], n)
    programs, told = turning(x, out, front)
    kernels.to_blocks[programs](*told, BLOCK=BLOCK, CHANNELS=CHANNELS, num_warps=4)
    return out


def turning(x: Tensor, out: Tensor, front: int) -> tuple[tuple[int, int], tuple[Tensor | int, ...]]:
    """The programs of `to_blocks`, for blocks and for tiles of channels, and what they are told."""
    batch, length, channels = x.shape
    n = out.shape[2]
    told = (length, batch, channels, front, n // 16, *x.stride(), n, BLOCK, batch * n)
    return (batch * (n // BLOCK), ceil(channels, CHANNELS)), (x, out, *told)


def from_rows(rows: Tensor, out: Tensor, start: int) -> Tensor:
    """[D, B, N] from time `start` on -> `out` [B, T, D], contiguous."""
    programs, told = returning(rows, out, start)
    kernels.from_blocks[programs](*told, BLOCK=BLOCK, CHANNELS=CHANNELS, num_warps=4)
    return out


def returning(rows: Tensor, out: Tensor, start: int) -> tuple[tuple[int, int], tuple[Tensor | int, ...]]:
    """The programs of `from_blocks`, likewise."""
    batch, length, channels = out.shape
    n = rows.shape[2]
    told = (length, batch, channels, start, n // 16, n, BLOCK, batch * n, length * channels, channels)
    return (batch * ceil(start + length, BLOCK), ceil(channels, CHANNELS)), (rows, out, *told)


def turns(x: Tensor) -> Tensor:
    """exp(2 pi i x) of float64 x."""
    return torch.polar(torch.ones_like(x), 2 * math.pi * x)


def count(n: int) -> Tensor:
    """0 .. n-1 in float64, on the CPU whatever the default device."""
    return torch.arange(n, dtype=torch.float64, device="cpu")


def parts(z: Tensor, dtype: torch.dtype, device: torch.device, *, transpose: bool = False) -> Tensor:
    """Real and imaginary parts [2, ...] of a matrix and, asked for, of its transpose [4, ...]."""
    both = [z.real, z.imag, z.real.T, z.imag.T] if transpose else [z.real, z.imag]
    return torch.stack(both).to(device, dtype)
