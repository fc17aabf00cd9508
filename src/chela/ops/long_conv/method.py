"""Which form of the long convolution runs on a GPU: all of the choice is here and looks at sizes and dtype alone."""

from typing import Literal

import torch

Method = Literal["toeplitz", "transform"]

LONGEST_REACH = 2560
"""Lags an output sees on average, up to which Toeplitz tiles beat transforms."""


def choose(dtype: torch.dtype, history: int, length: int, lags: int, ahead: int) -> Method:
    """Name the method for `length` outputs at the end of `history` inputs.

    Toeplitz tiles do O(T L) work on the matrix units, which take 16-bit numbers; transforms do O(T log T) work in
    float32, moving the data about ten times.

    Args:
        dtype: of the input.
        history: S + T.
        length: T, at least 1.
        lags: L, at most S + T.
        ahead: L2, at most T - 1.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return "transform"
    reach = _mean_reach(lags, history - length, length) + _mean_reach(ahead, 0, length)
    return "toeplitz" if reach <= LONGEST_REACH else "transform"


def _mean_reach(lags: int, carried: int, length: int) -> float:
    """Mean over T outputs of min(L, S + 1 + t): lags that meet an input."""
    rising = min(max(lags - carried - 1, 0), length)  # outputs that see the beginning of the history
    return lags - rising * (lags - carried - rising / 2) / length
