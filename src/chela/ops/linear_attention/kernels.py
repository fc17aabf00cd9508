"""Triton kernels of linear attention: the causal forward pass, one step of decoding, and what all kernels share.

Shapes: T time, H heads, K key width, V value width; C rows of a chunk, BK >= K and BV the tiles' widths. A row is a
sequence of the batch, or a document of a packed one, with one head. A split is a share of a row that one program
walks through: whole `unit`s of tokens, counted from the row's own start, so that no tile ever meets two rows. A period
is the distance, in tokens, of the states that are saved for the backward pass.

Lengths and strides are never constants of a kernel: one compilation serves them all. Strides come in units of
`ALIGN` entries, from which the compiler sees that loads may be wide.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

SIZES = ["length", "heads", "splits", "unit", "period", "slots", "tokens_in_all", "entries"]
STRIDES = [f"{tensor}_{axis}" for tensor in "qkvg" for axis in "bth"]


def jit(*strides: str) -> Callable[[Any], Any]:
    """Compile a kernel once for all sizes and for all strides of the tensors named."""
    return triton.jit(do_not_specialize=[*SIZES, *(name for name in STRIDES if name[0] in strides)])


@triton.jit
def row_span(cu_seqlens, n, length, PACKED: tl.constexpr):
    """First token of sequence n, counted over the whole batch, and its number of tokens."""
    if PACKED:
        first = tl.load(cu_seqlens + n)
        size = tl.load(cu_seqlens + n + 1) - first
        first = first.to(tl.int64)
    else:
        first = n.to(tl.int64) * length
        size = length
    return first, size


@triton.jit
def split_span(size, split, splits, unit):
    """Tokens [begin, end) of a row that a split walks through; none when begin >= size."""
    share = tl.cdiv(tl.cdiv(size, splits), unit) * unit
    begin = split * share
    return begin, tl.minimum(begin + share, size)


@triton.jit
def row_start(x, first, n, h, stride_b, stride_t, stride_h, ALIGN: tl.constexpr, PACKED: tl.constexpr):
    """Pointer to x at the row's first token."""
    if PACKED:
        along = first * stride_t
    else:
        along = n.to(tl.int64) * stride_b
    return x + (along + h.to(tl.int64) * stride_h) * ALIGN


@triton.jit
def load_tile(x, t, end, stride, column, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr):
    """x[t : t+C, column : column+BD], zero at and after token `end` and column D."""
    rows = tl.arange(0, C)
    columns = column + tl.arange(0, BD)
    inside = (t + rows < end)[:, None]
    if D % BD != 0:
        inside = inside & (columns < D)[None, :]
    start = x + tl.cast(t, tl.int64) * stride
    return tl.load(start + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)  # [C, BD]


@triton.jit
def store_tile(x, value, t, end, stride, column, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr):
    """x[t : t+C, column : column+BD] = value, up to token `end` and column D."""
    rows = tl.arange(0, C)
    columns = column + tl.arange(0, BD)
    inside = (t + rows < end)[:, None]
    if D % BD != 0:
        inside = inside & (columns < D)[None, :]
    start = x + tl.cast(t, tl.int64) * stride
    tl.store(start + rows[:, None] * stride + columns[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def state_tile(column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Offsets and mask of a tile [BK, BV] in a state [K, V]."""
    k = tl.arange(0, BK)[:, None]
    v = column + tl.arange(0, BV)[None, :]
    return k * V + v, (k < K) & (v < V)


@triton.jit
def power(log2_base, exponent):
    """base^exponent for an exponent that counts tokens, at least 0."""
    return tl.exp2(tl.maximum(exponent, 0).to(tl.float32) * log2_base)


@jit("q", "k", "v")
def causal_forward(
    q, k, v, out, start, saved, final, log2_decay, cu_seqlens,
    scale, length, heads, splits, unit, period, slots,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr,
    DECAYS: tl.constexpr, PACKED: tl.constexpr, STARTS: tl.constexpr, SAVES: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """out_t = scale (sum_{s <= t} g^(t-s) (q_t . k_s) v_s + g^(t+1) q_t S), S the state before the split."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    column = (program % tiles) * BV
    split = (program // tiles) % splits
    row = program // (tiles * splits)
    n = row // heads
    h = row % heads
    first, size = row_span(cu_seqlens, n, length, PACKED)
    begin, end = split_span(size, split, splits, unit)
    if (split > 0) & (begin >= size):
        return
    q_row = row_start(q, first, n, h, q_b, q_t, q_h, ALIGN, PACKED)
    k_row = row_start(k, first, n, h, k_b, k_t, k_h, ALIGN, PACKED)
    v_row = row_start(v, first, n, h, v_b, v_t, v_h, ALIGN, PACKED)
    out_row = out + (first * heads + h) * V
    if PACKED:
        slot = first // period + n
    else:
        slot = n.to(tl.int64) * slots
    offsets, inside = state_tile(column, K, V, BK, BV)
    state = tl.zeros([BK, BV], tl.float32)
    if STARTS:
        start_row = start + (row.to(tl.int64) * splits + split) * (K * V)
        state += tl.load(start_row + offsets, mask=inside, other=0.0)
    place = tl.arange(0, C)
    lag = place[:, None] - place[None, :]
    if DECAYS:
        log2_g = tl.load(log2_decay + h)
        weight = power(log2_g, lag)  # [C, C]
        from_start = power(log2_g, place + 1)[:, None]  # [C, 1]
    # Period by period: to ask in every chunk whether a state is to be saved would stall each behind the one before.
    first_period, periods = 0, 1
    if SAVES:
        first_period, periods = begin // period, tl.cdiv(end, period)
    for period_now in range(first_period, periods):
        here, stop = begin, end
        if SAVES:
            here, stop = tl.maximum(begin, period_now * period), tl.minimum(end, (period_now + 1) * period)
        for t in range(here, stop, C):
            q_c = load_tile(q_row, t, end, q_t * ALIGN, 0, K, BK, C)  # [C, BK]
            k_c = load_tile(k_row, t, end, k_t * ALIGN, 0, K, BK, C)  # [C, BK]
            v_c = load_tile(v_row, t, end, v_t * ALIGN, column, V, BV, C)  # [C, BV]
            scores = tl.dot(q_c, tl.trans(k_c), input_precision="tf32x3")  # [C, C]
            if DECAYS:
                scores *= weight
            scores = tl.where(lag >= 0, scores, 0.0).to(v_c.dtype)
            acc = tl.dot(q_c, state.to(q_c.dtype), input_precision="tf32x3")  # [C, BV]
            if DECAYS:
                acc *= from_start
                tokens = tl.minimum(end - t, C)
                k_c = (k_c * power(log2_g, tokens - 1 - place)[:, None]).to(v_c.dtype)
                state *= power(log2_g, tokens)
            acc = tl.dot(scores, v_c, acc, input_precision="tf32x3")
            state = tl.dot(tl.trans(k_c), v_c, state, input_precision="tf32x3")  # [BK, BV]
            store_tile(out_row, acc * scale, t, end, heads * V, column, V, BV, C)
        if SAVES:  # behind each period, the last of which may be shorter
            if (stop == (period_now + 1) * period) | (stop == size):
                saved_row = saved + ((slot + period_now) * heads + h) * (K * V)
                tl.store(saved_row + offsets, state, mask=inside)
    if ENDS:
        if end == size:
            tl.store(final + row.to(tl.int64) * (K * V) + offsets, state, mask=inside)


@jit("q", "k", "v")
def step(
    q, k, v, state, out, after, log2_decay, scale, heads, q_b, q_h, k_b, k_h, v_b, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, ALIGN: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """S = g S + k v^T, out = scale q S, for one token; `after` may be `state` itself."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    row = tl.program_id(0) // tiles
    column = (tl.program_id(0) % tiles) * BV
    n = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    offsets, inside = state_tile(column, K, V, BK, BV)
    key = tl.arange(0, BK)
    value = column + tl.arange(0, BV)
    q_r = tl.load(q + (n * q_b + h * q_h) * ALIGN + key, mask=key < K, other=0.0).to(tl.float32)
    k_r = tl.load(k + (n * k_b + h * k_h) * ALIGN + key, mask=key < K, other=0.0).to(tl.float32)
    v_r = tl.load(v + (n * v_b + h * v_h) * ALIGN + value, mask=value < V, other=0.0).to(tl.float32)
    s = tl.load(state + row.to(tl.int64) * (K * V) + offsets, mask=inside, other=0.0)  # [BK, BV]
    if DECAYS:
        s *= tl.exp2(tl.load(log2_decay + h))
    s += k_r[:, None] * v_r[None, :]
    o = tl.sum(q_r[:, None] * s, axis=0) * scale  # [BV]
    tl.store(after + row.to(tl.int64) * (K * V) + offsets, s, mask=inside)
    tl.store(out + row.to(tl.int64) * V + value, o.to(out.dtype.element_ty), mask=value < V)
