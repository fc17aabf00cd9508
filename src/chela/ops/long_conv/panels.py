"""The long convolution of rows longer than a chip holds: panels of channels, in two stages through memory.

The row of N times lies on the circle z^N = i as in `on_chip.py`, and N = N0 Ni. An outer stage takes tiles of columns
through a transform over N0 points; an inner one takes each of the N0 rows of Ni = N1 N2 through a transform on the
chip, multiplies by the kernel's spectrum and comes back; the outer stage is undone.

A program takes some neighbouring channels, as columns of the products. So input and output are read and written as
they lie, [B, T, D], with three passes over the data, none of which transposes; tables are read once for all channels.
Between the stages numbers are float16 over powers of two; errors are relative to the largest entry of a row and
about those of `on_chip.py`. Its programs wait for memory and for one another, so settings are such that two or more
run on a multiprocessor: that decides, not the number of multiplications.
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
    c: int
    """Channels of a panel, which a program of the inner stage takes."""
    width: int
    """Channels of a tile of the outer stage: those of some panels."""
    p: int = 8
    """Columns in such a tile, whose numbers share a power of two a channel; divides N2."""
    m: int = 1
    """Points of the outer stage's second step, of two; one step with 1."""
    outer_warps: int = 4
    outer_registers: int | None = 128
    """Most of them a thread."""
    warps: int = 8
    """Of the inner stage."""
    registers: int = 128

    @property
    def outer(self) -> dict[str, int | None]:
        """What kernels of the outer stage are compiled for."""
        cut = {"N0": self.n0, "M": self.m, "P": self.p, "C": self.c, "W": self.width}
        return cut | {"num_warps": self.outer_warps, "maxnreg": self.outer_registers}

    @property
    def inner(self) -> dict[str, int]:
        """What those of the inner one are."""
        cut = {"N0": self.n0, "N1": self.n1, "N2": self.n2, "P": self.p, "C": self.c}
        return cut | {"num_warps": self.warps, "num_stages": 1, "maxnreg": self.registers}


SIZES = {
    2**14: Size(64, 16, 16, c=8, width=16, outer_registers=168, warps=4),
    2**15: Size(64, 32, 16, c=8, width=16, outer_registers=168, warps=4),
    2**16: Size(64, 64, 16, c=8, width=16, outer_registers=168),
    2**17: Size(64, 64, 32, c=4, width=16, outer_registers=168),
    2**18: Size(256, 64, 16, c=4, width=4, m=16, outer_registers=None, warps=4),
    2**19: Size(256, 64, 32, c=4, width=4, m=16, outer_registers=None),
    2**20: Size(512, 64, 32, c=4, width=4, p=4, m=16, outer_warps=8),
}
"""By N. Inner rows of 64 times 64 of two channels were fast, too, and wrong with one setting of four: not used."""
LONGEST = max(SIZES)

Panels = tuple[Tensor, Tensor]
"""Numbers [B, G, 2, N0, Ni, C] in float16 of G panels and what they were divided by, in float32: see the kernels."""


def fitting(inputs: int) -> int:
    """N of the shortest row that holds so many inputs."""
    return min(n for n in SIZES if n >= inputs)


def forward(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> Tensor:
    """Convolve; arguments and result as `chela.ops.long_conv.fourier.fft_conv`, at most `LONGEST` 16-bit inputs."""
    return _forward(history, kernel, reverse, length, keep=False)[0]


def forward_keeping(
    history: Tensor, kernel: Tensor, reverse: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same, the spectra of the history and those of the kernels, each over powers, of `kept_shapes`."""
    out, kept, spectra = _forward(history, kernel, reverse, length, keep=True)
    return out, *kept, *spectra


def kept_shapes(batch: int, total: int, channels: int) -> tuple[tuple[int, ...], ...]:
    """Of the spectra and the powers of a batch of so many rows; float16 and float32."""
    size = SIZES[fitting(total)]
    panels = ceil(channels, size.width) * (size.width // size.c)
    return (batch, panels, 2, size.n0, size.n1 * size.n2, size.c), (batch, panels, size.n0, size.c)


def backward(
    grad: Tensor, history: Tensor, kernel: Tensor, reverse: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for history, kernel and reverse, given that of the output [B, T, D]."""
    size = SIZES[fitting(history.shape[1])]
    kept = _spectra(_outer(history, 0, size), size)
    spectra = _spectra(_outer_taps(kernel, reverse, size), size)
    return backward_of_kept(grad, kept, spectra, kernel, reverse, history.shape[1])


def backward_of_kept(
    grad: Tensor, kept: Panels, spectra: Panels, kernel: Tensor, reverse: Tensor, total: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from what the forward pass kept of `total` inputs and of the kernels, of which only sizes are read."""
    size = SIZES[fitting(total)]
    x, g = _convolve(_outer(grad, total - grad.shape[1], size), spectra, size, mirror=True, keep=True)
    d_history = _inverse(x, grad.new_empty(grad.shape[0], total, grad.shape[2]), 0, size)
    z = torch.empty_like(spectra[0])
    powers = _powers(z, size)
    panels_inner_kernels.inner_collect[(z.shape[1], size.n0)](
        *g, *kept, z, powers, *_tables(size, z.device)[1], 1, grad.shape[0], **size.inner
    )
    d_kernel, d_reverse = (torch.empty(taps.shape, dtype=taps.dtype, device=z.device) for taps in (kernel, reverse))
    sizes = (0, kernel.shape[1], reverse.shape[1])
    _outer_inverse((z, powers), d_kernel, d_reverse, sizes, kernel.shape[0], size, taps=True, ahead=sizes[2] > 0)
    return d_history, d_kernel, d_reverse


def _forward(
    history: Tensor, kernel: Tensor, reverse: Tensor, length: int, *, keep: bool
) -> tuple[Tensor, Panels, Panels]:
    """The output, the spectra of the history and those of the kernels; without `keep` the first alone counts."""
    total = history.shape[1]
    size = SIZES[fitting(total)]
    spectra = _spectra(_outer_taps(kernel, reverse, size), size)
    x, kept = _convolve(_outer(history, 0, size), spectra, size, mirror=False, keep=keep)
    out = history.new_empty(history.shape[0], length, history.shape[2])
    return _inverse(x, out, total - length, size), kept, spectra


@functools.lru_cache(maxsize=16)
def _tables(size: Size, device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """f0, g0, t0 and w0 of the outer stage; f1, f2 and w1 of the inner one. Factors in float16, twiddles in float32."""
    m1, inner, half, single = size.n0 // size.m, size.n1 * size.n2, torch.float16, torch.float32
    a0, b0, k0, a, c, p = (count(n) for n in (m1, size.m, size.n0, size.n1, size.n2, inner))
    f0 = turns(a0 / (4 * m1) - a0[:, None] * a0 / m1) / math.sqrt(m1)
    t0 = turns(b0 / (4 * size.n0) - a0[:, None] * b0 / size.n0)
    w0 = turns(((p / 4 - k0[:, None] * p) / (size.n0 * inner)) % 1)
    g0, f1, f2 = (turns(-k[:, None] * k / len(k)) / math.sqrt(len(k)) for k in (b0, a, c))
    f1 = torch.stack([f1.real, -f1.imag, f1.imag, f1.real]).to(device, half)
    w1 = turns(-a[:, None] * c / inner)
    first = parts(f0, half, device, transpose=True), parts(g0, half, device)
    outer = *first, parts(t0, single, device), parts(w0, single, device)
    return outer, (f1, parts(f2, half, device), parts(w1, single, device))


def _outer(x: Tensor, front: int, size: Size) -> Panels:
    """[B, T, D] with `front` zeros before it -> the outer stage's result."""
    x = x if x.stride(2) == 1 else x.contiguous()
    sizes = (front, x.shape[1], 0, size.n1 * size.n2 // 16, x.shape[2], *x.stride()[:2], 0, 0, 0, 0)
    return _outer_forward(x, x, x.shape[0], x.shape[2], size, sizes, taps=False, ahead=False)


def _outer_taps(kernel: Tensor, reverse: Tensor, size: Size) -> Panels:
    """Both kernels, as one row."""
    channels, lags, ahead = kernel.shape[0], kernel.shape[1], reverse.shape[1]
    sizes = (0, lags, ahead, size.n1 * size.n2 // 16, channels, 0, 0, *kernel.stride(), *reverse.stride())
    return _outer_forward(kernel, reverse, 1, channels, size, sizes, taps=True, ahead=ahead > 0)


def _outer_forward(
    x: Tensor, w: Tensor, batch: int, channels: int, size: Size, sizes: tuple[int, ...], *, taps: bool, ahead: bool
) -> Panels:
    groups, inner = ceil(channels, size.width), size.n1 * size.n2
    panels = groups * (size.width // size.c)
    z = torch.empty(batch, panels, 2, size.n0, inner, size.c, dtype=torch.float16, device=x.device)
    scales = torch.empty(batch, panels, inner // size.p, size.c, dtype=torch.float32, device=x.device)
    panels_outer_kernels.outer_forward[(groups, inner // size.p, batch)](
        x, w, z, scales, *_tables(size, x.device)[0], *sizes, TAPS=taps, AHEAD=ahead, **size.outer
    )
    return z, scales


def _spectra(x: Panels, size: Size) -> Panels:
    """The inner transform of every row: [B, G, 2, N0, N1, C, N2], over powers."""
    z, scales = x
    out, powers = torch.empty_like(z), _powers(z, size)
    panels_inner_kernels.inner_spectra[(z.shape[0] * z.shape[1], size.n0)](
        z, scales, out, powers, *_tables(size, z.device)[1], 2, **size.inner
    )
    return out, powers


def _convolve(x: Panels, spectra: Panels, size: Size, *, mirror: bool, keep: bool) -> tuple[Panels, Panels]:
    """Every row times its channel's spectrum, in place, and, to be kept, the rows' own spectra.

    Mirrored, from the gradient of the output to that of the history.
    """
    z, scales = x
    panels, powers = z.shape[1], _powers(z, size)
    kept = (torch.empty_like(z), _powers(z, size)) if keep else (z, powers)
    panels_inner_kernels.inner_convolve[(z.shape[0] * panels, size.n0)](
        z,
        scales,
        powers,
        *spectra,
        *kept,
        *_tables(size, z.device)[1],
        2,
        1,
        panels,
        KEEP=keep,
        MIRROR=mirror,
        **size.inner,
    )
    return (z, powers), kept


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
    panels_outer_kernels.outer_inverse[(z.shape[1] * size.c // size.width, inner // size.p, z.shape[0])](
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
        **size.outer,
    )


def _powers(z: Tensor, size: Size) -> Tensor:
    """Room for the powers of two after the inner stage."""
    return torch.empty(*z.shape[:2], size.n0, size.c, dtype=torch.float32, device=z.device)
