"""Which form of the long convolution runs on a GPU: all of the choice is here and looks at sizes and dtype alone.

The bounds come from one H100 (bfloat16, torch 2.11, Triton 3.6). To take a method out, take its case out of `choose`.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from chela.ops.launch import roomy

Method = Literal["toeplitz", "on_chip", "panels", "transform"]

LONGEST: dict[Method, int] = {"on_chip": 2**13, "panels": 2**20}
"""Inputs a row of these methods may have, a power of two; the first that has room is taken.

It is the fastest wherever that was timed (docs/log.md).
"""
TIGHT: dict[Method, int] = {"on_chip": 2**12, "panels": 2**20}
"""The same on a GPU with less shared memory than an H100 (`chela.ops.launch.roomy`)."""
BEATEN: dict[Method, int] = {"on_chip": 600, "panels": 1800, "transform": 4000}
"""Lags an output sees on average, up to which Toeplitz tiles beat a method, were its rows full."""


def choose(dtype: torch.dtype, history: int, length: int, lags: int, ahead: int, *, room: bool = True) -> Method:
    """Name the method for `length` outputs at the end of `history` inputs.

    Toeplitz tiles do O(T L) work on the matrix units, which take 16-bit numbers. Rows on the chip, or of panels of
    channels in two stages through memory, do O(T sqrt T) or less there, of rows padded to a power of two. Transforms
    do O(T log T) work in float32, moving the data about ten times.

    Args:
        dtype: of the input.
        history: S + T.
        length: T, at least 1.
        lags: L, at most S + T.
        ahead: L2, at most T - 1.
        room: whether the GPU has the shared memory of an H100, which the longest rows on the chip need.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return "transform"
    longest = LONGEST if room else TIGHT
    method: Method = next((name for name, most in longest.items() if history <= most), "transform")
    padding = (1 << (history - 1).bit_length()) / history if method in LONGEST else 1.0  # of work, by the row's length
    reach = _mean_reach(lags, history - length, length) + _mean_reach(ahead, 0, length)
    return "toeplitz" if reach <= BEATEN[method] * padding else method


def keeps(dtype: torch.dtype, history: int, *, room: bool = True) -> bool:
    """Whether the forward pass keeps rows for the backward pass: as far as methods that bring the history into some go.

    A program that is compiled for any length is compiled once more where a length crosses this bound.
    """
    return dtype in (torch.bfloat16, torch.float16) and history <= (LONGEST if room else TIGHT)["on_chip"]


def keeps_spectra(dtype: torch.dtype, history: int, taps: int) -> bool:
    """Whether the forward pass keeps spectra instead: of panels, where `taps`, both ways, reach most of the history.

    Then no shape makes tiles of them; a product of sizes tells that, which a compiler can follow.
    """
    fits = dtype in (torch.bfloat16, torch.float16) and LONGEST["on_chip"] < history <= LONGEST["panels"]
    return fits and 4 * taps >= 3 * history


def method_of(like: Tensor, total: int, kernel: Tensor, reverse: Tensor, length: int) -> Any:
    """The module that convolves `total` inputs of this dtype and device with kernels that are within reach."""
    from chela.ops.long_conv import on_chip, panels, toeplitz, transform

    sizes = total, length, kernel.shape[1], reverse.shape[1]
    name = choose(like.dtype, *sizes, room=roomy(like.device))
    methods = {"toeplitz": toeplitz, "on_chip": on_chip, "panels": panels}
    return methods.get(name, transform)


def _mean_reach(lags: int, carried: int, length: int) -> float:
    """Mean over T outputs of min(L, S + 1 + t): lags that meet an input."""
    rising = min(max(lags - carried - 1, 0), length)  # outputs that see the beginning of the history
    return lags - rising * (lags - carried - rising / 2) / length
