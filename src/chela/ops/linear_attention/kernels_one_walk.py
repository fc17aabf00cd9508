"""Triton kernel of the backward pass of causal linear attention in one walk, for states of one tile and no decay.

Words as in `kernels_backward`. The walk goes backwards with R, reads each input once and writes each gradient once.
The state S that dq needs is taken from the one saved behind each period, in float32, and each chunk's k^T v is taken
out of it again on the way. What that rounds away is relative to the largest state within the period, some 1e-7 of
it: dq feels later tokens of its period by that much.

The order dv, dk, dq is not free: with dq first, the compiler runs out of registers, and the walk takes a fifth longer
where a row is split.
"""

import triton.language as tl

from chela.ops.linear_attention.kernels import (
    jit,
    load_tile,
    row_span,
    row_start,
    split_span,
    state_tile,
    store_tile,
)


@jit("q", "k", "v", "g")
def all_gradients(
    q, k, v, g, dq, dk, dv, ends, saved, d_start, cu_seqlens,
    scale, length, heads, splits, unit, period, slots,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr,
    PACKED: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Write dq, dk, dv and d_start."""
    split = tl.program_id(0) % splits
    row = tl.program_id(0) // splits
    n = row // heads
    h = row % heads
    first, size = row_span(cu_seqlens, n, length, PACKED)
    begin, end = split_span(size, split, splits, unit)
    if (split > 0) & (begin >= size):
        return
    q_row = row_start(q, first, n, h, q_b, q_t, q_h, ALIGN, PACKED)
    k_row = row_start(k, first, n, h, k_b, k_t, k_h, ALIGN, PACKED)
    v_row = row_start(v, first, n, h, v_b, v_t, v_h, ALIGN, PACKED)
    g_row = row_start(g, first, n, h, g_b, g_t, g_h, ALIGN, PACKED)
    dq_row = dq + (first * heads + h) * K
    dk_row = dk + (first * heads + h) * K
    dv_row = dv + (first * heads + h) * V
    if PACKED:
        slot = first // period + n
    else:
        slot = n.to(tl.int64) * slots
    offsets, inside = state_tile(0, K, V, BK, BV)
    key = tl.arange(0, BK)[None, :]
    value = tl.arange(0, BV)[:, None]
    inside_transposed = (key < K) & (value < V)
    grad = tl.zeros([BK, BV], tl.float32)  # R
    if ENDS:
        at_end = ends + (row.to(tl.int64) * splits + split) * (K * V)
        grad += tl.load(at_end + offsets, mask=inside, other=0.0)
    minus = tl.zeros([BV, BK], tl.float32)  # -S, transposed: no operand of a product is a transposed accumulator
    place = tl.arange(0, C)
    lag = place[:, None] - place[None, :]
    chunks = tl.cdiv(tl.maximum(end - begin, 0), C)
    period_now = (end - 1) // period
    for i in range(chunks):
        t = begin + (chunks - 1 - i) * C
        q_c = load_tile(q_row, t, end, q_t * ALIGN, 0, K, BK, C)  # [C, BK]
        k_c = load_tile(k_row, t, end, k_t * ALIGN, 0, K, BK, C)  # [C, BK]
        v_c = load_tile(v_row, t, end, v_t * ALIGN, 0, V, BV, C)  # [C, BV]
        g_c = load_tile(g_row, t, end, g_t * ALIGN, 0, V, BV, C)  # [C, BV]
        leaving = t < period_now * period
        period_now -= leaving.to(tl.int32)
        if (i == 0) | leaving:
            saved_row = saved + ((slot + period_now) * heads + h) * (K * V)
            minus = -tl.load(saved_row + key * V + value, mask=inside_transposed, other=0.0)
        low = grad.to(g_c.dtype)
        scores = tl.dot(k_c, tl.trans(q_c), input_precision="tf32x3")  # [C of s, C of t]
        scores = tl.where(lag <= 0, scores, 0.0)
        acc = tl.dot(k_c, low, input_precision="tf32x3")  # [C, BV]
        acc = tl.dot(scores.to(g_c.dtype), g_c, acc, input_precision="tf32x3")
        store_tile(dv_row, acc * scale, t, end, heads * V, 0, V, BV, C)
        d_scores = tl.dot(v_c, tl.trans(g_c), input_precision="tf32x3")  # [C of s, C of t]
        d_scores = tl.where(lag <= 0, d_scores, 0.0)
        acc = tl.dot(v_c, tl.trans(low), input_precision="tf32x3")  # [C, BK]
        acc = tl.dot(d_scores.to(q_c.dtype), q_c, acc, input_precision="tf32x3")
        grad = tl.dot(tl.trans(q_c), g_c, grad, input_precision="tf32x3")  # [BK, BV]
        store_tile(dk_row, acc * scale, t, end, heads * K, 0, K, BK, C)
        minus = tl.dot(tl.trans(v_c), k_c, minus, input_precision="tf32x3")  # [BV, BK]
        d_scores = tl.dot(g_c, tl.trans(v_c), input_precision="tf32x3")  # [C of t, C of s]
        d_scores = tl.where(lag >= 0, d_scores, 0.0)
        acc = -tl.dot(g_c, minus.to(g_c.dtype), input_precision="tf32x3")  # [C, BK]
        acc = tl.dot(d_scores.to(k_c.dtype), k_c, acc, input_precision="tf32x3")
        store_tile(dq_row, acc * scale, t, end, heads * K, 0, K, BK, C)
    if STARTS:
        if split == 0:
            tl.store(d_start + row.to(tl.int64) * (K * V) + offsets, grad * scale, mask=inside)
