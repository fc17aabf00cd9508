"""The long convolution as products with Toeplitz tiles on the matrix units.

Time is cut into blocks of M; the input becomes rows [D, C, M], row c = block * B + batch, so that going back m blocks
is going back m B rows, whatever the batch. With one Toeplitz tile a block lag, read from the taps in place,

    out[c, j] = sum_m sum_k x[c - m B, k] tap(m M + j - k)

is one matrix product a channel, O(T L) work at the matrix units' rate. The gradient of the input is the same with
the taps mirrored, that of the taps a sum along the diagonals of grad^T x. Products are of numbers in the input's
dtype (the taps are rounded to it), sums in float32. A tap that looks into the future is exactly zero and multiplies
nothing else, so a finite change of the future changes no bit of the past. (Within its block, an infinity or a NaN
times that zero is NaN.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from chela.ops.long_conv import kernels
from chela.ops.long_conv.history import BLOCK, places


class Tiles(NamedTuple):
    """Sizes of tiles; all are powers of two."""

    block: int = BLOCK
    """M, times in a block."""
    rows: int = 128
    """Rows of the output in a tile of the convolution."""
    depth: int = 64
    """Times summed in a step of its loop."""
    warps: int = 8
    stages: int = 3
    gram_depth: int = 64
    """Rows summed in a step of the correlation's loop."""
    gram_warps: int = 4
    gram_stages: int = 3
    channels: int = 64
    """Channels in a tile of the passes that transpose."""


TILES = Tiles()


class Packing(NamedTuple):
    """Where the tokens of packed documents lie in rows of blocks (B = 1), and how far a row may see."""

    before: Tensor
    """int32 [C]: blocks of the same document before a row."""
    after: Tensor
    """int32 [C]: and after it."""


class Plan(NamedTuple):
    """Sizes of one convolution in blocks. The history is preceded by zeros that make its state fill whole blocks."""

    batch: int
    channels: int
    front: int
    """Zeros before the history."""
    rows_in: int
    rows_out: int
    shift: int
    """Rows of the state."""
    lags: int
    ahead: int
    first: int
    """Smallest block lag: -ceil(L2 / M)."""
    last: int
    """Largest block lag: ceil((L - 1) / M)."""
    tiles: Tiles
    packing: Packing | None


def plan(
    shape: Sequence[int],
    kernel: Tensor,
    reverse: Tensor,
    length: int,
    packing: Packing | None = None,
    tiles: Tiles = TILES,
) -> Plan:
    """Count the blocks of a convolution of a history [B, S+T, D] whose last T = `length` outputs are wanted."""
    batch, total, channels = shape
    m = tiles.block
    carried = -((length - total) // m)
    blocks = -(-length // m)
    lags, ahead = kernel.shape[1], reverse.shape[1]
    return Plan(
        batch=batch,
        channels=channels,
        front=_front(total, length),
        rows_in=(carried + blocks) * batch,
        rows_out=blocks * batch,
        shift=carried * batch,
        lags=lags,
        ahead=ahead,
        first=-ahead // m,
        last=-((1 - lags) // m),
        tiles=tiles,
        packing=packing,
    )


def forward(history: Tensor, kernel: Tensor, reverse: Tensor, length: int, packing: Packing | None = None) -> Tensor:
    """Convolve; arguments and result as `chela.ops.long_conv.fourier.fft_conv`."""
    p = plan(history.shape, kernel, reverse, length, packing)
    out = _convolve(*_prepare(history, kernel, reverse, p, flip=False), p, flip=False)
    return _from_rows(out, history.new_empty(p.batch, length, p.channels), p, 0)


def forward_keeping(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The same and the history in rows [D, B, `places`]; here those of all rows of the batch, block by block."""
    p = plan(history.shape, kernel, reverse, length)
    x, taps = _prepare(history, kernel, reverse, p, flip=False)
    out = _from_rows(_convolve(x, taps, p, flip=False), history.new_empty(p.batch, length, p.channels), p, 0)
    return out, x.view(p.channels, p.batch, -1)


def backward(
    grad: Tensor, history: Tensor, kernel: Tensor, reverse: Tensor, length: int, packing: Packing | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for history, kernel and reverse, given that of the output [B, T, D]."""
    p = plan(history.shape, kernel, reverse, length, packing)
    return _differentiate(grad, _to_rows(history, p, p.rows_in, p.front), kernel, reverse, history.shape[1], p)


def backward_of_kept(
    grad: Tensor, rows: Tensor, kernel: Tensor, reverse: Tensor, total: int, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from rows that the forward pass kept of `total` inputs."""
    channels, batch, _ = rows.shape
    p = plan((batch, total, channels), kernel, reverse, length)
    return _differentiate(grad, rows.view(channels, p.rows_in, p.tiles.block), kernel, reverse, total, p)


def recover(rows: Tensor, total: int, length: int) -> Tensor:
    """The history [B, S+T, D] of kept rows, in differentiable torch."""
    blocks = rows.view(rows.shape[0], -1, rows.shape[1], TILES.block)  # [D, blocks, B, M]
    return blocks.permute(2, 1, 3, 0).flatten(1, 2).narrow(1, _front(total, length), total)


def as_kept(history: Tensor, length: int) -> Tensor:
    """Its inverse and its adjoint."""
    total = history.shape[1]
    front = _front(total, length)
    padded = F.pad(history, (0, 0, front, places(total, length) - front - total))
    return padded.unflatten(1, (-1, TILES.block)).permute(3, 1, 0, 2).reshape(history.shape[2], history.shape[0], -1)


def _front(total: int, length: int) -> int:
    """Zeros that make a state of `total - length` inputs fill whole blocks."""
    return -(total - length) % TILES.block


def _differentiate(
    grad: Tensor, x: Tensor, kernel: Tensor, reverse: Tensor, total: int, p: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    g, taps = _prepare(grad, kernel, reverse, p, flip=True)
    d_rows = _convolve(g, taps, p, flip=True)
    d_history = _from_rows(d_rows, grad.new_empty(p.batch, total, p.channels), p, p.front)
    return d_history, *_correlate(g, x, p, kernel, reverse)


def _to_rows(x: Tensor, p: Plan, rows: int, front: int) -> Tensor:
    """[B, T, D] -> [D, C, M], `front` zeros before it and zeros behind."""
    t = p.tiles
    out = x.new_empty(p.channels, rows, t.block)
    kernels.to_blocks[(rows, triton.cdiv(p.channels, t.channels))](
        *_turning(x, out, p, front), BLOCK=t.block, CHANNELS=t.channels, num_warps=4
    )
    return out


def _turning(x: Tensor, out: Tensor, p: Plan, front: int) -> tuple[Tensor | int, ...]:
    """What `to_blocks` is told."""
    rows, m = out.shape[1:]
    limit = rows // p.batch * m // 16
    return x, out, x.shape[1], p.batch, p.channels, front, limit, *x.stride(), m, p.batch * m, rows * m


def _prepare(x: Tensor, kernel: Tensor, reverse: Tensor, p: Plan, *, flip: bool) -> tuple[Tensor, Tensor]:
    """History (flipped: gradient of the output) in rows [D, C, M], and both kernels by lag in eight copies.

    The copies are [D, 8, stretch M]; those of the backward pass are mirrored.
    """
    t = p.tiles
    rows, front, first, last = (p.rows_out, 0, -p.last, -p.first) if flip else (p.rows_in, p.front, p.first, p.last)
    stretch = last - first + 2
    out = x.new_empty(p.channels, rows, t.block)
    taps = kernel.new_empty(p.channels, 8, stretch * t.block, dtype=x.dtype)
    kernels.to_blocks_beside_taps[(p.channels * stretch + rows * triton.cdiv(p.channels, t.channels),)](
        *_turning(x, out, p, front),
        rows,
        kernel,
        reverse,
        taps,
        p.lags,
        p.ahead,
        1 - first,
        stretch,
        *kernel.stride(),
        *reverse.stride(),
        FLIP=flip,
        BLOCK=t.block,
        CHANNELS=t.channels,
        num_warps=4,
    )
    return out, taps


def _from_rows(rows: Tensor, out: Tensor, p: Plan, front: int) -> Tensor:
    """[D, C, M] -> `out` [B, T, D], contiguous."""
    m, channels = p.tiles.block, p.tiles.channels
    kernels.from_blocks[(rows.shape[1], triton.cdiv(p.channels, channels))](
        rows,
        out,
        out.shape[1],
        p.batch,
        p.channels,
        front,
        rows.shape[1] // p.batch * m // 16,
        m,
        p.batch * m,
        rows.shape[1] * m,
        out.shape[1] * p.channels,
        p.channels,
        BLOCK=m,
        CHANNELS=channels,
        num_warps=4,
    )
    return out


def _convolve(x: Tensor, taps: Tensor, p: Plan, *, flip: bool) -> Tensor:
    """[D, C_in, M] -> [D, C_out, M]; flipped, from the gradient of the output to that of the history."""
    t = p.tiles
    first, last, shift = (-p.last, -p.first, -p.shift) if flip else (p.first, p.last, p.shift)
    rows_in, rows_out = x.shape[1], p.rows_in if flip else p.rows_out
    out = x.new_empty(p.channels, rows_out, t.block)
    kernels.convolve_blocks[(p.channels, triton.cdiv(rows_out, t.rows))](
        x,
        taps,
        out,
        *(p.packing or (x, x)),
        rows_in,
        rows_out,
        p.batch,
        shift,
        first,
        last,
        1 - first,
        last - first + 2,
        BLOCK=t.block,
        ROWS=t.rows,
        DEPTH=t.depth,
        PACKED=p.packing is not None,
        num_warps=t.warps,
        num_stages=t.stages,
    )
    return out


def _correlate(g: Tensor, x: Tensor, p: Plan, kernel: Tensor, reverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the kernels from rows of the output's gradient and of the history."""
    t = p.tiles
    count = p.last - p.first + 1
    sums = torch.empty(p.channels, count, 2, t.block, dtype=torch.float32, device=x.device)
    kernels.correlate_blocks[(count, p.channels)](
        g,
        x,
        sums,
        *(p.packing or (x, x)),
        p.rows_in,
        p.rows_out,
        p.batch,
        p.shift,
        p.first,
        BLOCK=t.block,
        DEPTH=t.gram_depth,
        PACKED=p.packing is not None,
        num_warps=t.gram_warps,
        num_stages=t.gram_stages,
    )
    grads = []
    for taps, start, sign in ((kernel, 0, 1), (reverse, -1, -1)):
        out = torch.empty(taps.shape, dtype=taps.dtype, device=taps.device)
        if out.numel():
            kernels.collect_taps[(triton.cdiv(taps.shape[1], t.block), p.channels)](
                sums, out, count, taps.shape[1], p.first, start, SIGN=sign, BLOCK=t.block, num_warps=4
            )
        grads.append(out)
    return grads[0], grads[1]
