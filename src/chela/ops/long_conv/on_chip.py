"""The long convolution of rows that fit on a chip: transforms on the matrix units, one read and one write.

A row of real numbers is taken as a polynomial on the circle z^N = i. The product of two such rows is

    sum_n p_n z^n,  n = 0 .. 2N-2,   =   sum_{n < N} (p_n + i p_{n+N}) z^n,

so the linear convolution stands in the real part and what wraps around in the imaginary part: no row is padded to
twice its length. A tap l into the future is z^-l = -i z^(N-l), and what it brings from before the beginning is
imaginary too. With N = N1 N2 the transform is two products with small matrices and a twiddle between them
(`on_chip_kernels.py`), about N (N1 + N2) multiplications a row at the matrix units' rate.

Products are of float16 numbers, whatever 16-bit dtype the input has: every row is divided by a power of two that
brings its largest entry to [1, 2), so no input overflows. Sums are float32. Errors are relative to the row's largest
entry, as in any transform; the public docstring states them.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from chela.ops.launch import roomy
from chela.ops.long_conv import on_chip_kernels as kernels
from chela.ops.long_conv.rows import count, from_rows, parts, to_rows, turns


class Size(NamedTuple):
    """How a row of N = N1 N2 times is cut: powers of two, at least 16."""

    n1: int
    n2: int
    warps: int
    rows: int
    """Most rows of the batch that one program convolves with tables and spectrum that it reads once."""
    registers: int | None = None
    """Most of them a thread; fewer let more programs run side by side."""


SIZES = {
    1024: Size(64, 16, 4, 16),
    2048: Size(64, 32, 4, 8, 128),
    4096: Size(64, 64, 4, 8),
    8192: Size(128, 64, 8, 8),
}
"""By N. One warpgroup for every 64 rows of N1: more of them than that only split the matrix units' tiles."""
LONGEST = max(SIZES)
HELD = 4096
"""Longest rows whose tables any GPU's shared memory can hold; those of longer ones it holds where it is roomy."""
PROGRAMS = 256
"""As many programs there are before one takes several rows: two for each multiprocessor."""
PART = 8
"""Rows of the batch whose spectra one program sums for the gradient of the taps."""


def fitting(inputs: int) -> int:
    """N of the shortest row that holds so many inputs."""
    return min(n for n in SIZES if n >= inputs)


def forward(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> Tensor:
    """Convolve; arguments and result as `chela.ops.long_conv.fourier.fft_conv`, at most `LONGEST` 16-bit inputs."""
    n, end = fitting(history.shape[1]), history.shape[1]
    out = _convolve(to_rows(history, 0, n), _spectra(kernel, reverse, n), mirror=False)
    return from_rows(out, history.new_empty(history.shape[0], length, history.shape[2]), end - length)


def backward(
    grad: Tensor, history: Tensor, kernel: Tensor, reverse: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for history, kernel and reverse, given that of the output [B, T, D]."""
    n, end = fitting(history.shape[1]), history.shape[1]
    g = to_rows(grad, end - length, n)
    d_rows = _convolve(g, _spectra(kernel, reverse, n), mirror=True)
    d_history = from_rows(d_rows, history.new_empty(history.shape), 0)
    d_kernel, d_reverse = _correlate(g, to_rows(history, 0, n), kernel, reverse)
    return d_history, d_kernel, d_reverse


@functools.lru_cache(maxsize=32)
def _tables(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The factors f1 [4, N1, N1] and f2 [2, N2, N2] in float16 and the twiddle [2, N1, N2] in float32."""
    n1, n2, n = size.n1, size.n2, size.n1 * size.n2
    a, c = count(n1), count(n2)
    f1 = turns(a / (4 * n1) - a[:, None] * a / n1) / math.sqrt(n1)
    f2 = turns(-c[:, None] * c / n2) / math.sqrt(n2)
    twiddle = turns(c / (4 * n) - a[:, None] * c / n)
    return (
        parts(f1, torch.float16, device, transpose=True),
        parts(f2, torch.float16, device),
        parts(twiddle, torch.float32, device),
    )


def _spectra(kernel: Tensor, reverse: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Both kernels' transform over a power of two a channel, [D, 2, N1, N2], and that power [D]; float32."""
    size, channels, ahead = SIZES[n], kernel.shape[0], reverse.shape[1]
    spectra = torch.empty(channels, 2, size.n1, size.n2, dtype=torch.float32, device=kernel.device)
    powers = torch.empty(channels, dtype=torch.float32, device=kernel.device)
    kernels.transform_taps[(channels,)](
        kernel,
        reverse,
        spectra,
        powers,
        kernel.shape[1],
        ahead,
        *kernel.stride(),
        *reverse.stride(),
        *_tables(size, kernel.device),
        AHEAD=ahead > 0,
        N1=size.n1,
        N2=size.n2,
        num_warps=size.warps,
    )
    return spectra, powers


def _convolve(rows: Tensor, spectra: tuple[Tensor, Tensor], *, mirror: bool) -> Tensor:
    """[D, B, N] -> [D, B, N]; mirrored, from the gradient of the output to that of the history."""
    channels, batch, n = rows.shape
    size = SIZES[n]
    held = n <= HELD or roomy(rows.device)
    out = torch.empty_like(rows)
    each = min(size.rows, max(1, channels * batch // PROGRAMS)) if held else 1
    kernels.convolve_rows[(channels, -(-batch // each))](
        rows,
        out,
        *spectra,
        *_tables(size, rows.device),
        batch,
        each,
        MIRROR=mirror,
        HELD=held,
        N1=size.n1,
        N2=size.n2,
        num_warps=size.warps,
        num_stages=2 if held else 1,  # the next row's entries; tables would be fetched ahead as well
        maxnreg=size.registers,
    )
    return out


def _correlate(g: Tensor, x: Tensor, kernel: Tensor, reverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the kernels from rows of the output's gradient and of the history."""
    channels, batch, n = x.shape
    size, tables = SIZES[n], _tables(SIZES[n], x.device)
    groups, lags, ahead = -(-batch // PART), kernel.shape[1], reverse.shape[1]
    sums = torch.empty(groups, channels, 2, size.n1, size.n2, dtype=torch.float32, device=x.device)
    kernels.correlate_rows[(channels, groups)](
        g,
        x,
        sums,
        *tables,
        batch,
        channels,
        PART=PART,
        N1=size.n1,
        N2=size.n2,
        num_warps=size.warps,
        num_stages=1,  # prefetching rows takes registers the sums need
    )
    d_kernel, d_reverse = (torch.empty(taps.shape, dtype=taps.dtype, device=x.device) for taps in (kernel, reverse))
    kernels.collect_rows[(channels,)](
        sums,
        d_kernel,
        d_reverse,
        lags,
        ahead,
        groups,
        *tables,
        AHEAD=ahead > 0,
        N1=size.n1,
        N2=size.n2,
        num_warps=size.warps,
    )
    return d_kernel, d_reverse
