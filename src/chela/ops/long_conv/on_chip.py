"""The long convolution of rows that fit on a chip: transforms on the matrix units, one read and one write.

A row of real numbers is taken as a polynomial on the circle z^N = i. The product of two such rows is

    sum_n p_n z^n,  n = 0 .. 2N-2,   =   sum_{n < N} (p_n + i p_{n+N}) z^n,

so the linear convolution stands in the real part and what wraps around in the imaginary part: no row is padded to
twice its length. A tap l into the future is z^-l = -i z^(N-l), and what it brings from before the beginning is
imaginary too. With N = N1 N2 the transform is two products with small matrices and a twiddle between them
(`on_chip_steps.py`), about N (N1 + N2) multiplications a row at the matrix units' rate. Of short rows one kernel makes
both gradients, from one transform of the output's; of long ones, that takes more registers than a thread has.

Products are of float16 numbers, whatever 16-bit dtype the input has: every row is divided by a power of two that
brings its largest entry to [1, 2), so no input overflows. Sums are float32. Errors are relative to the row's largest
entry, as in any transform; the public docstring states them.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from chela.ops.launch import ceil
from chela.ops.long_conv import on_chip_kernels as kernels
from chela.ops.long_conv import on_chip_taps_kernels as taps_kernels
from chela.ops.long_conv.history import BLOCK, places
from chela.ops.long_conv.rows import CHANNELS, count, from_rows, parts, returning, to_rows, turning, turns


class Size(NamedTuple):
    """How a row of N = N1 N2 times is cut: powers of two, at least 16."""

    n1: int
    n2: int
    warps: int
    rows: int
    """Most rows of the batch that one program convolves with tables and spectrum that it reads once."""
    registers: int | None = None
    """Most of them a thread; fewer let more programs run side by side."""
    beside: int = 0
    """Most of them where taps have programs beside those of a pass that transposes, which should be many; 0 for a
    launch of their own."""
    gradients: int = 0
    """Most of them where one kernel makes both gradients; 0 for a kernel each, of rows too long for that."""

    @property
    def side(self) -> bool:
        """Whether real and imaginary parts are made side by side, too."""
        return self.gradients > 0

    @property
    def options(self) -> dict[str, int]:
        """What all kernels of such rows are compiled for."""
        return {"N1": self.n1, "N2": self.n2, "num_warps": self.warps}


SIZES = {
    1024: Size(64, 16, 4, 16, beside=80, gradients=128),
    2048: Size(64, 32, 4, 16, registers=128, beside=80, gradients=255),
    4096: Size(64, 64, 4, 8),
    8192: Size(128, 64, 8, 8),
}
"""By N. One warpgroup for every 64 rows of N1: more of them than that only split the matrix units' tiles."""
LONGEST = max(SIZES)
PROGRAMS = 256
"""As many programs there are before one takes several rows: two for each multiprocessor."""
MOST = 32
"""Most rows of the batch whose spectra one program sums for the gradient of the taps."""


def summed(channels: int, batch: int, size: Size) -> int:
    """Rows whose spectra one program sums: what ends first and, of those, the most, for fewer sums to read again.

    As many programs run at a time as there are registers for (2^16 of a multiprocessor), each as long as it has rows;
    reading its sum again takes about a quarter of a row.
    """
    at_a_time = PROGRAMS // 2 * (2**16 // (32 * size.warps * (size.gradients or 255)))

    def time(rows: int) -> tuple[float, int]:
        parts = ceil(batch, rows)
        return ceil(channels * parts, at_a_time) * rows + parts / 4, -rows

    return min(range(1, min(batch, MOST) + 1), key=time)


def fitting(inputs: int) -> int:
    """N of the shortest row that holds so many inputs."""
    return min(n for n in SIZES if n >= inputs)


def forward(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> Tensor:
    """Convolve; arguments and result as `chela.ops.long_conv.fourier.fft_conv`, at most `LONGEST` 16-bit inputs."""
    n, wide = _sizes(history.shape[1], length)
    return _outputs(_convolve(*_prepare(history, 0, wide, kernel, reverse, n), n, mirror=False), history, length)


def forward_keeping(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The same and the history in rows [D, B, `places`]."""
    n, wide = _sizes(history.shape[1], length)
    rows, spectra = _prepare(history, 0, wide, kernel, reverse, n)
    return _outputs(_convolve(rows, spectra, n, mirror=False), history, length), rows


def backward(
    grad: Tensor, history: Tensor, kernel: Tensor, reverse: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for history, kernel and reverse, given that of the output [B, T, D]."""
    total = history.shape[1]
    return backward_of_kept(grad, to_rows(history, 0, places(total, length)), kernel, reverse, total, length)


def backward_of_kept(
    grad: Tensor, rows: Tensor, kernel: Tensor, reverse: Tensor, total: int, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from rows that the forward pass kept of `total` inputs."""
    n, wide = _sizes(total, length)
    g, spectra = _prepare(grad, total - length, wide, kernel, reverse, n)
    if SIZES[n].gradients:
        d_rows, sums = _differentiate(g, rows, spectra, n)
    else:
        d_rows, sums = _convolve(g, spectra, n, mirror=True), _correlate(g, rows, n)
    d_history = grad.new_empty(grad.shape[0], total, grad.shape[2])
    return d_history, *_finish(d_rows, d_history, sums, kernel, reverse)


def recover(rows: Tensor, total: int, length: int) -> Tensor:
    """The history [B, S+T, D] of kept rows, in differentiable torch."""
    return rows.permute(1, 2, 0)[:, :total]


def as_kept(history: Tensor, length: int) -> Tensor:
    """Its inverse and its adjoint."""
    return F.pad(history.permute(2, 0, 1), (0, places(history.shape[1], length) - history.shape[1])).contiguous()


def _sizes(total: int, length: int) -> tuple[int, int]:
    """N, and the places that rows lie in: fewer, as a rule, where N is not full."""
    return fitting(total), places(total, length)


def _outputs(rows: Tensor, history: Tensor, length: int) -> Tensor:
    batch, total, channels = history.shape
    return from_rows(rows, history.new_empty(batch, length, channels), total - length)


@functools.lru_cache(maxsize=32)
def _tables(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The factors f1 and f2 in float16 and the twiddle in float32, as the kernels read them."""
    n1, n2, n = size.n1, size.n2, size.n1 * size.n2
    a, c = count(n1), count(n2)
    f1 = turns(a / (4 * n1) - a[:, None] * a / n1) / math.sqrt(n1)
    f2 = turns(-c[:, None] * c / n2) / math.sqrt(n2)
    twiddle = turns(c / (4 * n) - a[:, None] * c / n)
    f1_both = torch.cat([torch.cat([f1.real, f1.imag]).flatten(), torch.cat([f1.real.T, f1.imag.T], dim=1).flatten()])
    f2_both = torch.stack([torch.cat([z.real, z.imag], dim=1) for z in (f2, 1j * f2)])
    return f1_both.to(device, torch.float16), f2_both.to(device, torch.float16), parts(twiddle, torch.float32, device)


def _prepare(
    x: Tensor, front: int, wide: int, kernel: Tensor, reverse: Tensor, n: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """[B, T, D], `front` zeros before it, in rows [D, B, wide], and both kernels' transform over a power of two.

    The transform is [D, 2, N1, N2], the power of a channel [D]; float32.
    """
    size, channels, ahead = SIZES[n], kernel.shape[0], reverse.shape[1]
    spectra = torch.empty(channels, 2, size.n1, size.n2, dtype=torch.float32, device=kernel.device)
    powers = torch.empty(channels, dtype=torch.float32, device=kernel.device)
    taps = (kernel, reverse, spectra, powers, kernel.shape[1], ahead, *kernel.stride(), *reverse.stride())
    tables, options = _tables(size, kernel.device), {"AHEAD": ahead > 0, "SIDE": size.side, **size.options}
    if not size.beside:
        taps_kernels.transform_taps[(channels,)](*taps, *tables, **options)
        return to_rows(x, front, wide), (spectra, powers)
    rows = x.new_empty(channels, x.shape[0], wide)
    (blocks, tiles), told = turning(x, rows, front)
    taps_kernels.to_rows_beside_taps[(channels + blocks * tiles,)](
        *told,
        blocks,
        *taps,
        *tables,
        **options,
        BLOCK=BLOCK,
        CHANNELS=CHANNELS,
        maxnreg=size.beside,
    )
    return rows, (spectra, powers)


def _convolve(rows: Tensor, spectra: tuple[Tensor, Tensor], n: int, *, mirror: bool) -> Tensor:
    """Rows to rows; mirrored, from the gradient of the output to that of the history."""
    channels, batch, wide = rows.shape
    size = SIZES[n]
    out = torch.empty_like(rows)
    each = min(size.rows, max(1, channels * batch // PROGRAMS))
    kernels.convolve_rows[(channels, ceil(batch, each))](
        rows,
        out,
        *spectra,
        *_tables(size, rows.device),
        batch,
        each,
        wide // 16,
        MIRROR=mirror,
        SIDE=size.side,
        **size.options,
        num_stages=2,  # the next row's entries
        maxnreg=size.registers,
    )
    return out


def _correlate(g: Tensor, x: Tensor, n: int) -> Tensor:
    """Sums of products of spectra, by parts of the batch [groups, D, 2, N1, N2]; float32."""
    channels, batch, wide = x.shape
    size = SIZES[n]
    each = summed(channels, batch, size)
    sums = _sums(x, each, size)
    kernels.correlate_rows[(channels, sums.shape[0])](
        g,
        x,
        sums,
        *_tables(size, x.device),
        batch,
        channels,
        each,
        wide // 16,
        **size.options,
        num_stages=1,  # prefetching rows takes registers the sums need
    )
    return sums


def _differentiate(g: Tensor, x: Tensor, spectra: tuple[Tensor, Tensor], n: int) -> tuple[Tensor, Tensor]:
    """What `_convolve`, mirrored, and `_correlate` give, from one spectrum of every row of g."""
    channels, batch, wide = x.shape
    size = SIZES[n]
    each = summed(channels, batch, size)
    out, sums = torch.empty_like(g), _sums(x, each, size)
    kernels.differentiate_rows[(channels, sums.shape[0])](
        g,
        x,
        out,
        sums,
        *spectra,
        *_tables(size, x.device),
        batch,
        channels,
        each,
        wide // 16,
        **size.options,
        num_stages=1,
        maxnreg=size.gradients,
    )
    return out, sums


def _sums(x: Tensor, each: int, size: Size) -> Tensor:
    return torch.empty(ceil(x.shape[1], each), x.shape[0], 2, size.n1, size.n2, dtype=torch.float32, device=x.device)


def _finish(d_rows: Tensor, d_history: Tensor, sums: Tensor, kernel: Tensor, reverse: Tensor) -> tuple[Tensor, Tensor]:
    """Bring rows into `d_history`, and give the gradients of the kernels from sums of products of spectra."""
    groups, channels, _, n1, n2 = sums.shape
    size, lags, ahead = SIZES[n1 * n2], kernel.shape[1], reverse.shape[1]
    d_kernel, d_reverse = (torch.empty(taps.shape, dtype=taps.dtype, device=sums.device) for taps in (kernel, reverse))
    taps = (sums, d_kernel, d_reverse, lags, ahead, groups)
    tables, options = _tables(size, sums.device), {"AHEAD": ahead > 0, "SIDE": size.side, **size.options}
    if not size.beside:
        taps_kernels.collect_rows[(channels,)](*taps, channels, *tables, **options)
        from_rows(d_rows, d_history, 0)
        return d_kernel, d_reverse
    (blocks, tiles), told = returning(d_rows, d_history, 0)
    taps_kernels.from_rows_beside_taps[(channels + blocks * tiles,)](
        *told,
        blocks,
        *taps,
        *tables,
        **options,
        BLOCK=BLOCK,
        CHANNELS=CHANNELS,
        maxnreg=size.beside,
    )
    return d_kernel, d_reverse
