"""The long convolution by the convolution theorem on a GPU: torch's transforms between fused passes.

The mathematics is that of `fourier.py`, for any dtype and length. Between the transforms the data moves as seldom as
they allow: one pass brings [B, T, D] to rows of time, cast and padded; one multiplies spectra (backward, one does both
products and the sum over the batch); one crops, casts and brings the rows back.
"""

import torch
import triton
from torch import Tensor

from chela.ops.long_conv import kernels
from chela.ops.long_conv.fourier import good_size, kernel_spectrum, points
from chela.ops.precision import wide_dtype

BLOCK, CHANNELS, SPAN = 64, 32, 512
"""Times and channels in a tile of the passes that transpose; frequencies in one of those over spectra."""


def forward(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> Tensor:
    """Convolve; arguments and result as `chela.ops.long_conv.fourier.fft_conv`."""
    n, end = _points(history, kernel, reverse, length), history.shape[1]
    spectrum = _spectrum(history, 0, n)
    _filter(spectrum, kernel_spectrum(kernel, reverse, n, wide_dtype(history.dtype)))
    out = history.new_empty(history.shape[0], length, history.shape[2])
    return _from_rows(torch.fft.irfft(spectrum, n), out, end - length)


def backward(
    grad: Tensor, history: Tensor, kernel: Tensor, reverse: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for history, kernel and reverse, given that of the output [B, T, D]."""
    n, end = _points(history, kernel, reverse, length), history.shape[1]
    g, h = _spectrum(grad, end - length, n), _spectrum(history, 0, n)
    k = kernel_spectrum(kernel, reverse, n, wide_dtype(history.dtype))
    dk = torch.empty_like(k)
    batch, channels, count = g.shape
    kernels.filter_spectra_backward[(triton.cdiv(count, SPAN), channels)](
        *(torch.view_as_real(z) for z in (g, h, k, dk)), count, channels, batch, SPAN=SPAN, num_warps=4
    )
    del h
    on_circle = torch.fft.irfft(dk, n)  # [D, n]
    d_kernel = kernel.new_empty(kernel.shape).copy_(on_circle[:, : kernel.shape[1]])
    d_reverse = reverse.new_empty(reverse.shape).copy_(on_circle[:, n - reverse.shape[1] :].flip(1))
    return _from_rows(torch.fft.irfft(g, n), history.new_empty(history.shape), 0), d_kernel, d_reverse


def _points(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> int:
    """As many as the reference's or a few more: a multiple of 16, so that all rows are aligned alike."""
    return 8 * good_size(-(-points(history, kernel, reverse, length) // 8))


def _spectrum(x: Tensor, front: int, n: int) -> Tensor:
    """[B, T, D] with `front` zeros before it -> [B, D, n/2+1]."""
    batch, length, channels = x.shape
    rows = torch.empty(batch, channels, n, dtype=wide_dtype(x.dtype), device=x.device)
    kernels.to_blocks[(batch * triton.cdiv(n, BLOCK), triton.cdiv(channels, CHANNELS))](
        x,
        rows,
        length,
        batch,
        channels,
        front,
        n // 16,
        *x.stride(),
        channels * n,
        BLOCK,
        n,
        BLOCK=BLOCK,
        CHANNELS=CHANNELS,
        num_warps=4,
    )
    return torch.fft.rfft(rows)


def _filter(spectrum: Tensor, k: Tensor) -> None:
    """Multiply [B, D, n/2+1] by [D, n/2+1] in place."""
    batch, channels, count = spectrum.shape
    kernels.filter_spectra[(batch * channels, triton.cdiv(count, SPAN))](
        torch.view_as_real(spectrum), torch.view_as_real(k), count, channels, SPAN=SPAN, num_warps=4
    )


def _from_rows(rows: Tensor, out: Tensor, start: int) -> Tensor:
    """[B, D, n] from time `start` on -> `out` [B, T, D], contiguous."""
    batch, length, channels = out.shape
    n = rows.shape[2]
    kernels.from_blocks[(batch * triton.cdiv(start + length, BLOCK), triton.cdiv(channels, CHANNELS))](
        rows,
        out,
        length,
        batch,
        channels,
        start,
        n // 16,
        channels * n,
        BLOCK,
        n,
        length * channels,
        channels,
        BLOCK=BLOCK,
        CHANNELS=CHANNELS,
        num_warps=4,
    )
    return out
