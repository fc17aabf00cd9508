"""Triton kernels of one token of softmax attention over cached keys and values, in room of a fixed size.

    place     the new query and key are rotated by their position, key and value written at it
    partial   online softmax (Milakov and Gimelshein 2018) of a query over its share of the places 0 .. t
    combine   shares become one: "flash decoding" (Dao et al. 2023)

The position t lies on the device and every program reads it: one recording serves all lengths, and what a launch reads
grows with the places taken, not with the room.
"""

import triton.language as tl

from chela.ops.launch import jit


@jit("room")
def place(
    qkv, rates, position, q_out, keys, values, room,
    HEADS: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """A program a head of a row; pairs (i, i + K/2) turn by t rates_i."""
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    t = tl.load(position)
    i = tl.arange(0, HALVES)
    real = i < HALF
    angle = t.to(tl.float32) * tl.load(rates + i, mask=real, other=0)
    cos, sin = tl.cos(angle), tl.sin(angle)
    row = qkv + (b * 3 * HEADS + h) * K + i
    q1, q2 = tl.load(row, mask=real, other=0).to(tl.float32), tl.load(row + HALF, mask=real, other=0).to(tl.float32)
    row += HEADS * K
    k1, k2 = tl.load(row, mask=real, other=0).to(tl.float32), tl.load(row + HALF, mask=real, other=0).to(tl.float32)
    row += HEADS * K
    v1, v2 = tl.load(row, mask=real, other=0), tl.load(row + HALF, mask=real, other=0)
    to = q_out + (b * HEADS + h) * K + i
    tl.store(to, (q1 * cos - q2 * sin).to(q_out.dtype.element_ty), mask=real)
    tl.store(to + HALF, (q1 * sin + q2 * cos).to(q_out.dtype.element_ty), mask=real)
    at = ((b * room + t) * HEADS + h) * K + i
    tl.store(keys + at, (k1 * cos - k2 * sin).to(keys.dtype.element_ty), mask=real)
    tl.store(keys + at + HALF, (k1 * sin + k2 * cos).to(keys.dtype.element_ty), mask=real)
    tl.store(values + at, v1.to(values.dtype.element_ty), mask=real)
    tl.store(values + at + HALF, v2.to(values.dtype.element_ty), mask=real)


@jit("room")
def partial(
    q, keys, values, begins, position, sums, tops, weights, scale, room,
    HEADS: tl.constexpr, K: tl.constexpr, KEYS: tl.constexpr, SHARES: tl.constexpr, BLOCK: tl.constexpr,
    BEGINS: tl.constexpr,
):  # fmt: skip
    """A program a share of the places, head and row; `scale` has the factor log2(e)."""
    share = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    count = tl.load(position) + 1
    each = tl.cdiv(tl.cdiv(count, SHARES), BLOCK) * BLOCK
    first = share * each
    last = tl.minimum(first + each, count)
    begin = tl.load(begins + b) if BEGINS else 0
    i = tl.arange(0, KEYS)
    real = i < K
    query = tl.load(q + (b * HEADS + h) * K + i, mask=real, other=0).to(tl.float32) * scale
    top, weight = -float("inf"), 0.0
    total = tl.zeros([KEYS], tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        seen = (n < last) & (n >= begin)
        at = ((b * room + n) * HEADS + h)[:, None] * K + i[None, :]  # [BLOCK, KEYS]
        held = seen[:, None] & real[None, :]
        k = tl.load(keys + at, mask=held, other=0).to(tl.float32)
        v = tl.load(values + at, mask=held, other=0).to(tl.float32)
        score = tl.where(seen, tl.sum(query[None, :] * k, 1), -float("inf"))  # [BLOCK]
        higher = tl.maximum(top, tl.max(score, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # only padding so far
        shrink, p = tl.exp2(top - base), tl.exp2(score - base)
        weight = weight * shrink + tl.sum(p, 0)
        total = total * shrink + tl.sum(p[:, None] * v, 0)
        top = higher
    at = (b * HEADS + h) * SHARES + share
    tl.store(tops + at, top)
    tl.store(weights + at, weight)
    tl.store(sums + at * K + i, total, mask=real)


@jit()
def combine(sums, tops, weights, out, K: tl.constexpr, KEYS: tl.constexpr, SHARES: tl.constexpr):
    """A program a head of a row."""
    row = tl.program_id(0).to(tl.int64)
    s, i = tl.arange(0, SHARES), tl.arange(0, KEYS)
    real = i < K
    top = tl.load(tops + row * SHARES + s)  # [SHARES]
    factor = tl.exp2(top - tl.max(top, 0))
    weight = tl.sum(factor * tl.load(weights + row * SHARES + s), 0)
    at = (row * SHARES + s)[:, None] * K + i[None, :]  # [SHARES, KEYS]
    total = tl.sum(factor[:, None] * tl.load(sums + at, mask=real[None, :], other=0), 0)
    tl.store(out + row * K + i, (total / weight).to(out.dtype.element_ty), mask=real)
