"""The masks of `chela.ops.dropout` in Triton, bit for bit."""

import triton
import triton.language as tl


@triton.jit
def _philox(seed, row, first, STREAM: tl.constexpr, WIDTH: tl.constexpr):
    """The generator's four words for every eight entries of a tile [ROWS, WIDTH / 8]."""
    tl.static_assert(WIDTH % 64 == 0)
    column = first // 8 + tl.arange(0, WIDTH // 8)  # 8 (column // 64) + column % 8
    c0 = row[:, None].to(tl.uint32) + (column * 0)[None, :].to(tl.uint32)
    c1 = (row * 0)[:, None].to(tl.uint32) + column[None, :].to(tl.uint32)
    return tl.philox(seed, c0, c1, c0 * 0 + STREAM, c0 * 0)


@triton.jit
def keep(seed, row, first, threshold, STREAM: tl.constexpr, WIDTH: tl.constexpr):
    """Which entries of a tile are kept, [ROWS, WIDTH] int1.

    `seed` is the number itself (int64), `row` [ROWS] the rows' numbers among all of the tensor's, `first` the tile's
    first column, a multiple of 64, and WIDTH a power of two from 64 on. One call of the generator serves 8 entries,
    and all 8 belong to the thread that has them as a result of a matrix product.
    """
    w0, w1, w2, w3 = _philox(seed, row, first, STREAM, WIDTH)
    # A half is compared as the upper one of a word, whose lower one then makes no difference.
    low = tl.join(tl.join(w0 << 16, w2 << 16), tl.join(w1 << 16, w3 << 16))
    high = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(low, high)  # [ROWS, WIDTH / 8, word // 2, word % 2, half]
    halves = tl.reshape(halves, [row.shape[0], WIDTH // 64, 8, 2, 2, 2])
    halves = tl.permute(halves, [0, 1, 3, 4, 5, 2])
    return tl.reshape(halves, [row.shape[0], WIDTH]) >= tl.full([1, 1], threshold << 16, tl.uint32)


@triton.jit
def _pair(word, least, first: tl.constexpr):
    """Bits `first` and `first + 1`: whether the lower and the upper half of a word are kept."""
    return ((word << 16) >= least).to(tl.int32) << first | (word >= least).to(tl.int32) << (first + 1)


@triton.jit
def keep_loaded(bits_ptr, seed, row, there, threshold, STREAM: tl.constexpr, WIDTH: tl.constexpr):
    """The same for whole rows as they are loaded, of which a thread has columns side by side.

    `there` [ROWS] says which rows there are. The answers are left at `bits_ptr`, eight in a byte [N, WIDTH / 8], and
    read again, which moves them between threads: anything else makes each thread draw all that its entries need, eight
    times as much.
    """
    w0, w1, w2, w3 = _philox(seed, row, 0, STREAM, WIDTH)
    least = tl.full([1, 1], threshold << 16, tl.uint32)
    bits = _pair(w0, least, 0) | _pair(w1, least, 2) | _pair(w2, least, 4) | _pair(w3, least, 6)
    at = row.to(tl.int64)[:, None] * (WIDTH // 8) + tl.arange(0, WIDTH // 8)[None, :]
    tl.store(bits_ptr + at, bits.to(tl.uint8), mask=there[:, None])
    tl.debug_barrier()
    return kept_before(bits_ptr, row, there, WIDTH)


@triton.jit
def kept_before(bits_ptr, row, there, WIDTH: tl.constexpr):
    """What `keep_loaded` has left there, [ROWS, WIDTH] int1."""
    column = tl.arange(0, WIDTH)
    at = row.to(tl.int64)[:, None] * (WIDTH // 8) + (column // 64 * 8 + column % 8)[None, :]
    bits = tl.load(bits_ptr + at, mask=there[:, None], other=0).to(tl.int32)
    return (bits >> (column // 8 % 8)[None, :]) & 1 != 0
