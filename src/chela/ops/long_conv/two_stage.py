"""The long convolution of the longest rows: the transforms of `on_chip.py` in two stages through memory.

The row of N times lies on the circle z^N = i as there, and N = N0 Ni. An outer stage takes tiles of columns through a
transform over N0 points; an inner one takes each of the N0 rows of Ni = N1 N2 through a transform on the chip,
multiplies by the kernel's spectrum and comes back; the outer stage is undone. Between the stages numbers are float16
over a power of two a tile or a row, so each stage moves about twice the bytes of a 16-bit input and is bound by that.

The convolution thus takes five passes over the data, two of them transposing; torch's transforms take about ten in
float32. Errors are relative to the largest entry of a row and about those of `on_chip.py`.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from chela.ops.long_conv import two_stage_kernels as kernels
from chela.ops.long_conv.rows import count, from_rows, parts, to_rows, turns


class Size(NamedTuple):
    """How a row of N = N0 N1 N2 times is cut: powers of two, at least 16."""

    n0: int
    n1: int
    n2: int
    warps: int
    """Of the inner stage."""


SIZES = {
    2**18: Size(128, 64, 32, 4),
    2**19: Size(128, 64, 64, 8),
    2**20: Size(128, 128, 64, 8),
}
"""By N."""
LONGEST = max(SIZES)
TILE, WARPS = 64, 4
"""Columns in a tile of the outer stage, whose numbers share a power of two, and its warps."""

Spectrum = tuple[Tensor, Tensor]
"""Numbers [R, 2, N0, Ni] in float16 and what they were divided by: [R, Ni / TILE] or [R, N0] in float32."""


def fitting(inputs: int) -> int:
    """N of the shortest row that holds so many inputs."""
    return min(n for n in SIZES if n >= inputs)


def forward(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> Tensor:
    """Convolve; arguments and result as `chela.ops.long_conv.fourier.fft_conv`, at most `LONGEST` 16-bit inputs."""
    n, end = fitting(history.shape[1]), history.shape[1]
    rows = to_rows(history, 0, n)
    _inverse(_convolve(_outer(rows), _spectra(kernel, reverse, n), mirror=False), rows)
    return from_rows(rows, history.new_empty(history.shape[0], length, history.shape[2]), end - length)


def backward(
    grad: Tensor, history: Tensor, kernel: Tensor, reverse: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for history, kernel and reverse, given that of the output [B, T, D]."""
    n, end = fitting(history.shape[1]), history.shape[1]
    rows = to_rows(grad, end - length, n)
    g = _outer(rows)
    _inverse(_convolve(g, _spectra(kernel, reverse, n), mirror=True), rows)
    d_history = from_rows(rows, history.new_empty(history.shape), 0)
    d_kernel, d_reverse = _correlate(g, _outer(to_rows(history, 0, n)), n, kernel, reverse)
    return d_history, d_kernel, d_reverse


@functools.lru_cache(maxsize=16)
def _tables(size: Size, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """For the outer stage f0 [4, N0, N0], twiddle [2, N0, Ni]; for the inner one f1, f2 and twiddle [2, N1, N2]."""
    inner, half, single = size.n1 * size.n2, torch.float16, torch.float32
    a0, a, c, p = count(size.n0), count(size.n1), count(size.n2), count(inner)
    f0 = turns(a0 / (4 * size.n0) - a0[:, None] * a0 / size.n0) / math.sqrt(size.n0)
    w0 = turns(((p / 4 - a0[:, None] * p) / (size.n0 * inner)) % 1)
    f1, f2 = (turns(-k[:, None] * k / len(k)) / math.sqrt(len(k)) for k in (a, c))
    w1 = turns(-a[:, None] * c / inner)
    outer = parts(f0, half, device, transpose=True), parts(w0, single, device)
    return outer, (parts(f1, half, device), parts(f2, half, device), parts(w1, single, device))


def _outer(rows: Tensor) -> Spectrum:
    """[D, B, N] -> the outer stage's result, D B rows."""
    channels, batch, n = rows.shape
    return _outer_forward(rows, rows, (n, 0, n, 1, n, 1), channels * batch, n, taps=False, ahead=False)


def _outer_forward(
    x: Tensor, w: Tensor, sizes: tuple[int, ...], count: int, n: int, *, taps: bool, ahead: bool
) -> Spectrum:
    size = SIZES[n]
    inner = n // size.n0
    out = torch.empty(count, 2, size.n0, inner, dtype=torch.float16, device=x.device)
    scales = torch.empty(count, inner // TILE, dtype=torch.float32, device=x.device)
    kernels.outer_forward[(count, inner // TILE)](
        x,
        w,
        out,
        scales,
        *_tables(size, x.device)[0],
        *sizes,
        inner // 16,
        TAPS=taps,
        AHEAD=ahead,
        N0=size.n0,
        TILE=TILE,
        num_warps=WARPS,
    )
    return out, scales


def _spectra(kernel: Tensor, reverse: Tensor, n: int) -> Spectrum:
    """Transform of both kernels, D rows over powers of two [D, N0]."""
    size, channels, lags, ahead = SIZES[n], kernel.shape[0], kernel.shape[1], reverse.shape[1]
    sizes = (lags, ahead, *kernel.stride(), *reverse.stride())
    z, scales = _outer_forward(kernel, reverse, sizes, channels, n, taps=True, ahead=ahead > 0)
    powers = torch.empty(channels, size.n0, dtype=torch.float32, device=z.device)
    kernels.inner_spectra[(channels, size.n0)](
        z, scales, z, powers, *_tables(size, z.device)[1], TILE=TILE, **_cut(size)
    )
    return z, powers


def _convolve(x: Spectrum, spectra: Spectrum, *, mirror: bool) -> Spectrum:
    """Inner transform of every row, product with its channel's spectrum, and back to before the inner transform."""
    z, scales = x
    size = SIZES[z.shape[2] * z.shape[3]]
    out, powers = torch.empty_like(z), torch.empty(z.shape[0], size.n0, dtype=torch.float32, device=z.device)
    kernels.inner_convolve[(z.shape[0], size.n0)](
        z,
        scales,
        out,
        powers,
        *spectra,
        *_tables(size, z.device)[1],
        z.shape[0] // spectra[0].shape[0],
        MIRROR=mirror,
        TILE=TILE,
        **_cut(size),
    )
    return out, powers


def _inverse(x: Spectrum, rows: Tensor) -> None:
    """Undo the outer stage: into `rows` [D, B, N]."""
    _outer_inverse(x, rows, rows, (rows.shape[2], 0), taps=False, ahead=False)


def _outer_inverse(
    x: Spectrum, out: Tensor, future: Tensor, sizes: tuple[int, int], *, taps: bool, ahead: bool
) -> None:
    z, powers = x
    size, n = SIZES[z.shape[2] * z.shape[3]], z.shape[2] * z.shape[3]
    inner = n // size.n0
    kernels.outer_inverse[(z.shape[0], inner // TILE)](
        z,
        powers,
        out,
        future,
        *_tables(size, z.device)[0],
        math.sqrt(n),
        *sizes,
        inner // 16,
        TAPS=taps,
        AHEAD=ahead,
        N0=size.n0,
        TILE=TILE,
        num_warps=WARPS,
    )


def _correlate(g: Spectrum, x: Spectrum, n: int, kernel: Tensor, reverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the kernels from the outer stage's results for the output's gradient and the history."""
    size, channels, device = SIZES[n], kernel.shape[0], kernel.device
    z = torch.empty(channels, 2, size.n0, n // size.n0, dtype=torch.float16, device=device)
    powers = torch.empty(channels, size.n0, dtype=torch.float32, device=device)
    batch = g[0].shape[0] // channels
    kernels.inner_correlate[(channels, size.n0)](
        *g, *x, z, powers, *_tables(size, device)[1], batch, TILE=TILE, num_stages=1, **_cut(size)
    )
    d_kernel, d_reverse = (torch.empty(taps.shape, dtype=taps.dtype, device=device) for taps in (kernel, reverse))
    lags, ahead = kernel.shape[1], reverse.shape[1]
    _outer_inverse((z, powers), d_kernel, d_reverse, (lags, ahead), taps=True, ahead=ahead > 0)
    return d_kernel, d_reverse


def _cut(size: Size) -> dict[str, int]:
    return {"N0": size.n0, "N1": size.n1, "N2": size.n2, "num_warps": size.warps}
