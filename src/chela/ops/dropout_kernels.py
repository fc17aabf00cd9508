"""The masks of `chela.ops.dropout` in Triton, bit for bit."""

import triton
import triton.language as tl


@triton.jit
def keep(seed, row, first, threshold, STREAM: tl.constexpr, WIDTH: tl.constexpr):
    """Which entries of a tile are kept, [ROWS, WIDTH] int1.

    `seed` is the number itself (int64), `row` [ROWS] the rows' numbers among all of the tensor's, `first` the tile's
    first column, a multiple of 64, and WIDTH a power of two from 64 on. One call of the generator serves 8 entries,
    and all 8 belong to the thread that has them as a result of a matrix product.
    """
    tl.static_assert(WIDTH % 64 == 0)
    GROUPS: tl.constexpr = WIDTH // 64
    column = first // 8 + tl.arange(0, WIDTH // 8)  # 8 (column // 64) + column % 8
    c0 = row[:, None].to(tl.uint32) + (column * 0)[None, :].to(tl.uint32)
    c1 = (row * 0)[:, None].to(tl.uint32) + column[None, :].to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c0 * 0 + STREAM, c0 * 0)
    # A half is compared as the upper one of a word, whose lower one then makes no difference.
    low = tl.join(tl.join(w0 << 16, w2 << 16), tl.join(w1 << 16, w3 << 16))
    high = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(low, high)  # [ROWS, WIDTH / 8, word // 2, word % 2, half]
    halves = tl.reshape(halves, [row.shape[0], GROUPS, 8, 2, 2, 2])
    halves = tl.permute(halves, [0, 1, 3, 4, 5, 2])
    return tl.reshape(halves, [row.shape[0], WIDTH]) >= tl.full([1, 1], threshold << 16, tl.uint32)
