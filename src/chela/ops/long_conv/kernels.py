"""Triton kernels of the long convolution. Shapes and launches are in `toeplitz.py` and `transform.py`.

B batch, D channels, C rows of blocks (block-major: row c = block * B + batch), M = BLOCK times in a block. Sizes that
follow from the length of the input are plain arguments that Triton does not specialise on: one compilation serves all
lengths. Where an address must be known to be aligned, the size comes divided by a constant and is multiplied by it.
"""

import triton.language as tl

from chela.ops.launch import jit


@jit("length", "batch", "front", "limit")
def to_blocks(
    x, out, length, batch, width, front, limit, xb, xt, xd, ob, oi, od, BLOCK: tl.constexpr, CHANNELS: tl.constexpr
):
    """out[b, d, p] = x[b, p - front, d] for p < 16 limit, zero where x has nothing: time goes to the last axis."""
    part, tile = tl.program_id(0), tl.program_id(1)
    turn_block(part, tile, x, out, length, batch, width, front, limit, xb, xt, xd, ob, oi, od, BLOCK, CHANNELS)


@jit("length", "batch", "front", "limit", "blocks", "lags", "ahead", "origin", "stretch", "kd", "rd", "rl")
def to_blocks_beside_taps(
    x, out, length, batch, width, front, limit, xb, xt, xd, ob, oi, od, blocks,
    kernel, reverse, taps, lags, ahead, origin, stretch, kd, kl, rd, rl,
    FLIP: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`to_blocks` of so many blocks, and M taps of a channel shifted by each of the last programs.

    These are many and short, and run where the others leave room.
    """
    program = tl.program_id(0)
    last = program - blocks * tl.cdiv(width, CHANNELS)
    if last < 0:
        part, tile = program % blocks, program // blocks
        turn_block(part, tile, x, out, length, batch, width, front, limit, xb, xt, xd, ob, oi, od, BLOCK, CHANNELS)
    else:
        d, part = (last // stretch).to(tl.int64), last % stretch
        _shift(d, part, kernel, reverse, taps, lags, ahead, origin, stretch, kd, kl, rd, rl, FLIP, BLOCK)


@jit()
def turn_block(
    part, tile, x, out, length, batch, width, front, limit, xb, xt, xd, ob, oi, od,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A program's part of `to_blocks`: a block of time of a row of the batch, and a tile of channels.

    The masks along the axis that lies in a row change only at multiples of 16 (or of what the compiler knows of the
    number of channels), or loads and stores could not be wide.
    """
    b, i = part % batch, part // batch
    place = i * BLOCK + tl.arange(0, BLOCK)
    t = place - front
    d = (tile * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
    source = x + b.to(tl.int64) * xb + t.to(tl.int64)[:, None] * xt + d[None, :] * xd  # [BLOCK, CHANNELS]
    value = tl.load(source, mask=((t >= 0) & (t < length))[:, None] & (d < width)[None, :], other=0)
    target = out + b.to(tl.int64) * ob + i.to(tl.int64) * oi + d[None, :] * od + tl.arange(0, BLOCK)[:, None]
    tl.store(target, value.to(out.dtype.element_ty), mask=(place < limit * 16)[:, None] & (d < width)[None, :])


@jit("length", "batch", "front", "limit")
def from_blocks(
    blocks, out, length, batch, width, front, limit, bb, bi, bd, o_b, o_t, BLOCK: tl.constexpr, CHANNELS: tl.constexpr
):
    """out[b, t, d] = blocks[b, d, t + front] at the times 0 <= t < length: channels go back to the last axis."""
    part, tile = tl.program_id(0), tl.program_id(1)
    turn_block_back(part, tile, blocks, out, length, batch, width, front, limit, bb, bi, bd, o_b, o_t, BLOCK, CHANNELS)


@jit()
def turn_block_back(
    part, tile, blocks, out, length, batch, width, front, limit, bb, bi, bd, o_b, o_t,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A program's part of `from_blocks`, as in `turn_block`."""
    b, i = part % batch, part // batch
    place = i * BLOCK + tl.arange(0, BLOCK)
    t = place - front
    d = (tile * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
    source = blocks + b.to(tl.int64) * bb + i.to(tl.int64) * bi + d[None, :] * bd + tl.arange(0, BLOCK)[:, None]
    value = tl.load(source, mask=(place < limit * 16)[:, None] & (d < width)[None, :], other=0)  # [BLOCK, CHANNELS]
    target = out + b.to(tl.int64) * o_b + t.to(tl.int64)[:, None] * o_t + d[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=((t >= 0) & (t < length))[:, None] & (d < width)[None, :])


@jit()
def _shift(
    d, part, kernel, reverse, taps, lags, ahead, origin, stretch, kd, kl, rd, rl,
    FLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """taps[d, s, p] = the tap of lag p + s - origin M (of its negative, if FLIP), for s = 0 .. 7, M of all p.

    Eight copies, each one place further on, so that a run of taps that starts anywhere starts at a multiple of eight
    places in one of them.
    """
    p = part * BLOCK + tl.arange(0, BLOCK)
    for s in tl.static_range(8):
        lag = p + s - origin * BLOCK
        if FLIP:
            lag = -lag
        past = tl.load(kernel + d * kd + lag.to(tl.int64) * kl, mask=(lag >= 0) & (lag < lags), other=0)
        future = tl.load(reverse + d * rd - (lag + 1).to(tl.int64) * rl, mask=(lag < 0) & (-lag <= ahead), other=0)
        tap = past.to(tl.float32) + future.to(tl.float32)  # one of them is zero
        tl.store(taps + ((d * 8 + s) * stretch) * BLOCK + p, tap.to(taps.dtype.element_ty))


@jit("rows_in", "rows_out", "batch", "shift", "first_lag", "last_lag", "origin", "stretch")
def convolve_blocks(
    x,
    taps,
    out,
    before,
    after,
    rows_in,
    rows_out,
    batch,
    shift,
    first_lag,
    last_lag,
    origin,
    stretch,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    PACKED: tl.constexpr,
):
    """out[c, j] = sum_m sum_k x[c + shift - m B, k] tap(m M + j - k), a product with Toeplitz tiles.

    `m` runs over block lags first_lag .. last_lag; a row of x that does not exist is zero. Packed, a row sees block
    lags -after .. before only: those of its own document.
    """
    d = tl.program_id(0).to(tl.int64)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # causal: the longest sums first, of all channels
    c = tile * ROWS + tl.arange(0, ROWS)
    j, k = tl.arange(0, BLOCK), tl.arange(0, DEPTH)
    newest = tl.minimum(tile * ROWS + ROWS, rows_out) - 1 + shift
    begin = tl.maximum(first_lag, -((rows_in - 1 - tile * ROWS - shift) // batch))
    end = tl.minimum(last_lag, newest // batch) + 1
    back, ahead = c, c
    if PACKED:
        back = tl.load(before + c, mask=c < rows_out, other=0)
        ahead = tl.load(after + c, mask=c < rows_out, other=0)
        begin = tl.maximum(begin, -tl.max(ahead, 0))
        end = tl.minimum(end, tl.max(back, 0) + 1)
    # lag m M + j - k is read from the copy in which it is aligned: k rounded up to a multiple of 8 goes back from m M
    upwards = ((k + 7) // 8) * 8
    run = d * 8 * stretch * BLOCK + ((upwards - k) * stretch + origin) * BLOCK - upwards
    taps += run[:, None] + j[None, :]  # [DEPTH, BLOCK]
    x += d * rows_in * BLOCK + (c + shift).to(tl.int64)[:, None] * BLOCK + k[None, :]  # [ROWS, DEPTH]
    STEPS: tl.constexpr = BLOCK // DEPTH
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for n in range((end - begin) * STEPS):
        m = begin + n // STEPS
        inside = (n - n // STEPS * STEPS) * DEPTH
        keep = (c >= m * batch - shift) & (c < m * batch - shift + rows_in)
        if PACKED:
            keep &= (m <= back) & (m >= -ahead)
        value = tl.load(x - m.to(tl.int64) * batch * BLOCK + inside, mask=keep[:, None], other=0)
        toeplitz = tl.load(taps + m * BLOCK - inside)
        total = tl.dot(value, toeplitz, total, input_precision="ieee")
    target = out + (d * rows_out + c)[:, None] * BLOCK + j[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(c < rows_out)[:, None])


@jit("rows_in", "rows_out", "batch", "shift", "first_lag")
def correlate_blocks(
    grad,
    x,
    sums,
    before,
    after,
    rows_in,
    rows_out,
    batch,
    shift,
    first_lag,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The gradient of the taps of a block lag m: G[j, k] = sum_c grad[c, j] x[c + shift - m B, k], by diagonals.

    An entry belongs to lag m M + j - k, so sums[d, m - first_lag] gets two rows: [0] for the lags m M - M + p
    (j < k), [1] for m M + p (j >= k), p = 0 .. M-1.
    """
    d = tl.program_id(1).to(tl.int64)
    m = first_lag + tl.program_id(0)
    j, k, p = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    begin = tl.maximum(0, m * batch - shift)
    end = tl.minimum(rows_out, rows_in - shift + m * batch)
    grad += d * rows_out * BLOCK
    x += d * rows_in * BLOCK
    gram = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(begin, end, DEPTH):
        c = start + tl.arange(0, DEPTH)
        keep = c < end
        if PACKED:
            keep &= (m <= tl.load(before + c, mask=keep, other=0)) & (m >= -tl.load(after + c, mask=keep, other=0))
        g = tl.load(grad + c.to(tl.int64)[:, None] * BLOCK + j[None, :], mask=keep[:, None], other=0)  # [DEPTH, BLOCK]
        row = (c + shift - m * batch).to(tl.int64)
        h = tl.load(x + row[:, None] * BLOCK + k[None, :], mask=keep[:, None], other=0)  # [DEPTH, BLOCK]
        gram = tl.dot(tl.trans(g), h, gram, input_precision="ieee")
    turned = tl.gather(gram, (j[:, None] - p[None, :]) & (BLOCK - 1), axis=1)  # column p: k = j - p on the circle
    straight = j[:, None] >= p[None, :]
    target = sums + (d * tl.num_programs(0) + tl.program_id(0)) * 2 * BLOCK + p
    tl.store(target, tl.sum(tl.where(straight, 0.0, turned), axis=0))
    tl.store(target + BLOCK, tl.sum(tl.where(straight, turned, 0.0), axis=0))


@jit("count", "lags", "first_lag", "start")
def collect_taps(sums, out, count, lags, first_lag, start, SIGN: tl.constexpr, BLOCK: tl.constexpr):
    """out[d, n] = the gradient of lag start + SIGN n, from the two block lags it has entries in."""
    d = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = start + SIGN * n - first_lag * BLOCK  # not negative
    m, p = place // BLOCK, place % BLOCK
    keep = n < lags
    own = tl.load(sums + ((d * count + m) * 2 + 1) * BLOCK + p, mask=keep & (m < count), other=0)
    next_one = tl.load(sums + ((d * count + m + 1) * 2) * BLOCK + p, mask=keep & (m + 1 < count), other=0)
    tl.store(out + d * lags + n, (own + next_one).to(out.dtype.element_ty), mask=keep)


@jit()
def _complex(pointer, keep):
    """Real and imaginary parts of numbers that lie side by side."""
    return tl.split(tl.load(pointer[:, None] + tl.arange(0, 2)[None, :], mask=keep[:, None], other=0))


@jit()
def _store_complex(pointer, real, imaginary, keep):
    tl.store(pointer[:, None] + tl.arange(0, 2)[None, :], tl.join(real, imaginary), mask=keep[:, None])


@jit("points", "channels")
def filter_spectra(h, k, points, channels, SPAN: tl.constexpr):
    """h[b, d, w] *= k[d, w], complex."""
    row = tl.program_id(0).to(tl.int64)  # b D + d
    w = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    keep = w < points
    target = h + 2 * (row * points + w)
    hr, hi = _complex(target, keep)
    kr, ki = _complex(k + 2 * ((row % channels) * points + w), keep)
    _store_complex(target, hr * kr - hi * ki, hr * ki + hi * kr, keep)


@jit("points", "channels", "batch")
def filter_spectra_backward(g, h, k, dk, points, channels, batch, SPAN: tl.constexpr):
    """dk[d, w] = sum_b conj(h[b, d, w]) g[b, d, w]; then g[b, d, w] *= conj(k[d, w])."""
    d = tl.program_id(1).to(tl.int64)
    w = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    keep = w < points
    kr, ki = _complex(k + 2 * (d * points + w), keep)
    real, imaginary = tl.zeros_like(kr), tl.zeros_like(kr)
    for b in range(batch):
        at = 2 * ((b * channels + d) * points + w)
        hr, hi = _complex(h + at, keep)
        gr, gi = _complex(g + at, keep)
        real += hr * gr + hi * gi
        imaginary += hr * gi - hi * gr
        _store_complex(g + at, gr * kr + gi * ki, gi * kr - gr * ki, keep)
    _store_complex(dk + 2 * (d * points + w), real, imaginary, keep)
