"""The long convolution of rows a little longer than a chip holds: panels of channels, in two stages through memory.

The row of N times lies on the circle z^N = i as in `on_chip.py`, and N = N0 Ni. An outer stage takes tiles of columns
through a transform over N0 points; an inner one takes each of the N0 rows of Ni = N1 N2 through a transform on the
chip, multiplies by the kernel's spectrum and comes back; the outer stage is undone.

A program takes C neighbouring channels, as columns of the products. So input and output are read and written as they
lie, [B, T, D], with three passes over the data, none of which transposes; tables are read once for all C.
Between the stages numbers are float16 over powers of two; errors are relative to the largest entry of a row and
about those of `on_chip.py`.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from chela.ops.launch import ceil
from chela.ops.long_conv import panels_inner_kernels, panels_outer_kernels
from chela.ops.long_conv.rows import count, parts, turns


class Size(NamedTuple):
    """How a row of N = N0 N1 N2 times is cut, and its channels; powers of two, N0, N1 and N2 at least 16."""

    n0: int
    n1: int
    n2: int
    outer_warps: int
    warps: int = 8
    """Of the inner stage."""
    c: int = 8
    """Channels of a panel."""
    part: int = 8
    """Those of them that a program of the inner stage takes, and below, where it also sums over the batch."""
    sum_part: int = 8
    p: int = 16
    """Columns in a tile of the outer stage, whose numbers share a power of two a channel; divides N2."""


SIZES = {
    2**14: Size(16, 64, 16, 4),
    2**15: Size(32, 64, 16, 4),
    2**16: Size(64, 64, 16, 4),
    2**17: Size(128, 64, 16, 8),
}
"""By N."""
LONGEST = max(SIZES)

Panels = tuple[Tensor, Tensor]
"""Numbers [B, G, 2, N0, Ni, C] in float16 of G panels and what they were divided by, in float32: see the kernels."""


def fitting(inputs: int) -> int:
    """N of the shortest row that holds so many inputs."""
    return min(n for n in SIZES if n >= inputs)


def forward(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> Tensor:
    """Convolve; arguments and result as `chela.ops.long_conv.fourier.fft_conv`, at most `LONGEST` 16-bit inputs."""
    end = history.shape[1]
    size = SIZES[fitting(end)]
    x = _convolve(_outer(history, 0, size), _spectra(kernel, reverse, size), size, mirror=False)
    return _inverse(x, history.new_empty(history.shape[0], length, history.shape[2]), end - length, size)


def backward(
    grad: Tensor, history: Tensor, kernel: Tensor, reverse: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for history, kernel and reverse, given that of the output [B, T, D]."""
    end = history.shape[1]
    size = SIZES[fitting(end)]
    g = _outer(grad, end - length, size)
    d_kernel, d_reverse = _correlate(g, _outer(history, 0, size), size, kernel, reverse)
    g = _convolve(g, _spectra(kernel, reverse, size), size, mirror=True)
    return _inverse(g, history.new_empty(history.shape), 0, size), d_kernel, d_reverse


@functools.lru_cache(maxsize=16)
def _tables(size: Size, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """f0 and w0 of the outer stage; f1, f2 and w1 of the inner one. Factors in float16, twiddles in float32."""
    inner, half, single = size.n1 * size.n2, torch.float16, torch.float32
    a0, a, c, p = count(size.n0), count(size.n1), count(size.n2), count(inner)
    f0 = turns(a0 / (4 * size.n0) - a0[:, None] * a0 / size.n0) / math.sqrt(size.n0)
    w0 = turns(((p / 4 - a0[:, None] * p) / (size.n0 * inner)) % 1)
    f1, f2 = (turns(-k[:, None] * k / len(k)) / math.sqrt(len(k)) for k in (a, c))
    f1 = torch.stack([f1.real, -f1.imag, f1.imag, f1.real]).to(device, half)
    w1 = turns(-a[:, None] * c / inner)
    outer = parts(f0, half, device, transpose=True), parts(w0, single, device)
    return outer, (f1, parts(f2, half, device), parts(w1, single, device))


def _outer(x: Tensor, front: int, size: Size) -> Panels:
    """[B, T, D] with `front` zeros before it -> the outer stage's result."""
    x = x if x.stride(2) == 1 else x.contiguous()
    sizes = (front, x.shape[1], 0, size.n1 * size.n2 // 16, x.shape[2], *x.stride()[:2], 0, 0, 0, 0)
    return _outer_forward(x, x, x.shape[0], x.shape[2], size, sizes, taps=False, ahead=False)


def _outer_forward(
    x: Tensor, w: Tensor, batch: int, channels: int, size: Size, sizes: tuple[int, ...], *, taps: bool, ahead: bool
) -> Panels:
    panels, inner = ceil(channels, size.c), size.n1 * size.n2
    z = torch.empty(batch, panels, 2, size.n0, inner, size.c, dtype=torch.float16, device=x.device)
    scales = torch.empty(batch, panels, inner // size.p, size.c, dtype=torch.float32, device=x.device)
    panels_outer_kernels.outer_forward[(panels, inner // size.p, batch)](
        x,
        w,
        z,
        scales,
        *_tables(size, x.device)[0],
        *sizes,
        TAPS=taps,
        AHEAD=ahead,
        N0=size.n0,
        P=size.p,
        C=size.c,
        num_warps=size.outer_warps,
    )
    return z, scales


def _spectra(kernel: Tensor, reverse: Tensor, size: Size) -> Panels:
    """Transform of both kernels, as one row of panels [1, G, 2, N0, N1, C, N2] over powers."""
    channels, lags, ahead = kernel.shape[0], kernel.shape[1], reverse.shape[1]
    sizes = (0, lags, ahead, size.n1 * size.n2 // 16, channels, 0, 0, *kernel.stride(), *reverse.stride())
    z, scales = _outer_forward(kernel, reverse, 1, channels, size, sizes, taps=True, ahead=ahead > 0)
    out, powers = torch.empty_like(z), _powers(z, size)
    panels_inner_kernels.inner_spectra[(z.shape[1] * size.c // size.part, size.n0)](
        z, scales, out, powers, *_tables(size, z.device)[1], 2, E=size.part, **_cut(size)
    )
    return out, powers


def _convolve(x: Panels, spectra: Panels, size: Size, *, mirror: bool) -> Panels:
    """Inner transform of every row, product with its channel's spectrum, and back to before the inner transform.

    The result takes the place of the numbers given.
    """
    z, scales = x
    panels, powers = z.shape[1], _powers(z, size)
    panels_inner_kernels.inner_convolve[(z.shape[0] * panels * size.c // size.part, size.n0)](
        z, scales, powers, *spectra, *_tables(size, z.device)[1], 2, 1, panels, MIRROR=mirror, E=size.part, **_cut(size)
    )
    return z, powers


def _inverse(x: Panels, out: Tensor, start: int, size: Size) -> Tensor:
    """Undo the outer stage: from time `start` on into `out` [B, T, D], contiguous."""
    _outer_inverse(x, out, out, (start, out.shape[1], 0), out.shape[2], size, taps=False, ahead=False)
    return out


def _outer_inverse(
    x: Panels,
    out: Tensor,
    future: Tensor,
    sizes: tuple[int, int, int],
    channels: int,
    size: Size,
    *,
    taps: bool,
    ahead: bool,
) -> None:
    z, powers = x
    inner = size.n1 * size.n2
    panels_outer_kernels.outer_inverse[(z.shape[1], inner // size.p, z.shape[0])](
        z,
        powers,
        out,
        future,
        *_tables(size, z.device)[0],
        math.sqrt(size.n0 * inner),
        *sizes,
        inner // 16,
        channels,
        TAPS=taps,
        AHEAD=ahead,
        N0=size.n0,
        P=size.p,
        C=size.c,
        num_warps=size.outer_warps,
    )


def _correlate(g: Panels, x: Panels, size: Size, kernel: Tensor, reverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the kernels from the outer stage's results for the output's gradient and the history."""
    z = torch.empty_like(x[0][:1])
    powers, batch, panels = _powers(z, size), x[0].shape[0], z.shape[1]
    panels_inner_kernels.inner_correlate[(panels * size.c // size.sum_part, size.n0)](
        *g, *x, z, powers, *_tables(size, z.device)[1], 2, 1, batch, E=size.sum_part, **_cut(size)
    )
    d_kernel, d_reverse = (torch.empty(taps.shape, dtype=taps.dtype, device=z.device) for taps in (kernel, reverse))
    (channels, lags), ahead = kernel.shape, reverse.shape[1]
    _outer_inverse((z, powers), d_kernel, d_reverse, (0, lags, ahead), channels, size, taps=True, ahead=ahead > 0)
    return d_kernel, d_reverse


def _powers(z: Tensor, size: Size) -> Tensor:
    """Room for the powers of two after the inner stage."""
    return torch.empty(*z.shape[:2], size.n0, size.c, dtype=torch.float32, device=z.device)


def _cut(size: Size) -> dict[str, int]:
    return {"N0": size.n0, "N1": size.n1, "N2": size.n2, "P": size.p, "C": size.c} | {
        "num_warps": size.warps,
        "num_stages": 1,
    }
