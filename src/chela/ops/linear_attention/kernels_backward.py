"""Triton kernel of the backward pass of causal linear attention; shapes and words as in `kernels`.

With G_t the gradient of out_t, S_t the state and R_t its gradient (per head; decay g, scale included in R):

    dq_t = scale sum_{s <= t} g^(t-s) (G_t . v_s) k_s + scale g^(t+1) S_0 G_t
    dk_s = scale sum_{t >= s} g^(t-s) (G_t . v_s) q_t + g^(end-1-s) R v_s
    dv_s = scale sum_{t >= s} g^(t-s) (q_t . k_s) G_t + g^(end-1-s) R^T k_s

dq needs states from the front, dk and dv need R from the end. So each period is walked through twice, first forwards
from the state saved before it, then backwards: the second walk finds its inputs in the cache.
"""

import triton
import triton.language as tl

from chela.ops.linear_attention.kernels import (
    _jit,
    load_tile,
    power,
    row_span,
    row_start,
    split_span,
    state_tile,
    store_tile,
)


@_jit("q", "k", "v", "g")
def causal_backward(
    q, k, v, g, dq, dk, dv, end_grads, saved, d_start, d_log_decay, log2_decay, cu_seqlens,
    scale, length, heads, splits, period, slots, batch_tokens,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr,
    DECAYS: tl.constexpr, PACKED: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """dq, dk (of each tile of V by itself), dv, d_start; d_log_decay [programs], for the natural logarithm."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    tile = program % tiles
    column = tile * BV
    split = (program // tiles) % splits
    row = program // (tiles * splits)
    n = row // heads
    h = row % heads
    first, size = row_span(cu_seqlens, n, length, PACKED)
    begin, end = split_span(size, split, splits, period)
    if (split > 0) & (begin >= size):
        return
    q_t, k_t, v_t = tl.multiple_of(q_t, ALIGN), tl.multiple_of(k_t, ALIGN), tl.multiple_of(v_t, ALIGN)
    g_t = tl.multiple_of(g_t, ALIGN)
    q_row = row_start(q, first, n, h, tl.multiple_of(q_b, ALIGN), q_t, tl.multiple_of(q_h, ALIGN), PACKED)
    k_row = row_start(k, first, n, h, tl.multiple_of(k_b, ALIGN), k_t, tl.multiple_of(k_h, ALIGN), PACKED)
    v_row = row_start(v, first, n, h, tl.multiple_of(v_b, ALIGN), v_t, tl.multiple_of(v_h, ALIGN), PACKED)
    g_row = row_start(g, first, n, h, tl.multiple_of(g_b, ALIGN), g_t, tl.multiple_of(g_h, ALIGN), PACKED)
    tile_first = tile.to(tl.int64) * batch_tokens + first
    dq_row = dq + (tile_first * heads + h) * K
    dk_row = dk + (tile_first * heads + h) * K
    dv_row = dv + (first * heads + h) * V
    if PACKED:
        slot = first // period + n
    else:
        slot = n.to(tl.int64) * slots
    offsets, inside = state_tile(column, K, V, BK, BV)
    value = column + tl.arange(0, BV)[:, None]
    key = tl.arange(0, BK)[None, :]
    grad = tl.zeros([BK, BV], tl.float32)  # R
    if ENDS:
        end_row = end_grads + (row.to(tl.int64) * splits + split) * (K * V)
        grad += tl.load(end_row + offsets, mask=inside, other=0.0)
    place = tl.arange(0, C)
    lag = place[:, None] - place[None, :]
    if DECAYS:
        log2_g = tl.load(log2_decay + h)
        from_start = power(log2_g, place + 1)[:, None]  # [C, 1]
        d_log = tl.zeros([C], tl.float32)
        d_end = tl.zeros([BK], tl.float32)
    periods = tl.cdiv(tl.maximum(end - begin, 0), period)
    for p in range(0, periods):
        p_begin = begin + (periods - 1 - p) * period
        p_end = tl.minimum(p_begin + period, end)
        saved_row = saved + ((slot + p_begin // period) * heads + h) * (K * V)
        # The state, transposed [BV, BK]: no operand of a product below is a transposed accumulator.
        state = tl.load(saved_row + key * V + value, mask=(key < K) & (value < V), other=0.0).to(tl.float32)
        if DECAYS:
            d_state = tl.zeros([BV, BK], tl.float32)  # derivative of the state by log g, counted from p_begin
        for t in range(p_begin, p_end, C):
            k_c = load_tile(k_row, t, p_end, k_t, 0, K, BK, C)  # [C, BK]
            v_c = tl.trans(load_tile(v_row, t, p_end, v_t, column, V, BV, C))  # [BV, C]
            g_c = load_tile(g_row, t, p_end, g_t, column, V, BV, C)  # [C, BV]
            d_scores = tl.dot(g_c, v_c, input_precision="ieee")  # [C, C]
            if DECAYS:
                d_scores *= power(log2_g, lag)
            d_scores = tl.where(lag >= 0, d_scores, 0.0)
            acc = tl.dot(g_c, state.to(g_c.dtype), input_precision="ieee")  # [C, BK]
            if DECAYS:
                acc *= from_start
                tokens = tl.minimum(p_end - t, C)
                to_end = power(log2_g, tokens - 1 - place)[:, None]
                q_c = load_tile(q_row, t, p_end, q_t, 0, K, BK, C)  # [C, BK]
                scores = tl.dot(q_c, tl.trans(k_c), input_precision="ieee")
                d_log += tl.sum(lag.to(tl.float32) * scores * d_scores, axis=1)
                d_log += (place + 1) * tl.sum(q_c * acc, axis=1)
                through = tl.dot(g_c, d_state.to(g_c.dtype), input_precision="ieee") * from_start
                d_log += tl.sum(q_c * through, axis=1)
                steps = tl.maximum(tokens - 1 - place, 0).to(tl.float32)[:, None]
                d_state = (d_state + tokens * state) * power(log2_g, tokens)
                late = (k_c * (steps * to_end)).to(g_c.dtype)
                d_state = tl.dot(v_c, late, d_state, input_precision="ieee")
            acc = tl.dot(d_scores.to(k_c.dtype), k_c, acc, input_precision="ieee")
            if DECAYS:
                state *= power(log2_g, tokens)
                k_c = (k_c * to_end).to(g_c.dtype)
            state = tl.dot(v_c, k_c, state, input_precision="ieee")  # [BV, BK]
            store_tile(dq_row, acc * scale, t, p_end, heads * K, 0, K, BK, C)
        if DECAYS:
            d_end += tl.sum(grad * tl.trans(d_state), axis=1)  # through the state behind the period
        chunks = tl.cdiv(p_end - p_begin, C)
        for i in range(0, chunks):
            t = p_begin + (chunks - 1 - i) * C
            q_c = load_tile(q_row, t, p_end, q_t, 0, K, BK, C)  # [C, BK]
            k_c = load_tile(k_row, t, p_end, k_t, 0, K, BK, C)  # [C, BK]
            v_c = load_tile(v_row, t, p_end, v_t, column, V, BV, C)  # [C, BV]
            g_c = load_tile(g_row, t, p_end, g_t, column, V, BV, C)  # [C, BV]
            low = grad.to(g_c.dtype)
            scores = tl.dot(k_c, tl.trans(q_c), input_precision="ieee")  # [C of s, C of t]
            d_scores = tl.dot(v_c, tl.trans(g_c), input_precision="ieee")  # [C of s, C of t]
            d_v = tl.dot(k_c, low, input_precision="ieee")  # [C, BV]
            d_k = tl.dot(v_c, tl.trans(low), input_precision="ieee")  # [C, BK]
            if DECAYS:
                tokens = tl.minimum(p_end - t, C)
                to_end = power(log2_g, tokens - 1 - place)[:, None]
                weight = power(log2_g, -lag)
                scores *= weight
                d_scores *= weight
                d_v *= to_end
                d_k *= to_end
            scores = tl.where(lag <= 0, scores * scale, 0.0)
            d_scores = tl.where(lag <= 0, d_scores * scale, 0.0)
            d_v = tl.dot(scores.to(g_c.dtype), g_c, d_v, input_precision="ieee")
            d_k = tl.dot(d_scores.to(q_c.dtype), q_c, d_k, input_precision="ieee")
            if DECAYS:
                grad *= power(log2_g, tokens)
                q_c = (q_c * from_start).to(g_c.dtype)
            grad += scale * tl.dot(tl.trans(q_c), g_c, input_precision="ieee")  # [BK, BV]
            store_tile(dv_row, d_v, t, p_end, heads * V, column, V, BV, C)
            store_tile(dk_row, d_k, t, p_end, heads * K, 0, K, BK, C)
    if STARTS:
        if split == 0:
            tl.store(d_start + row.to(tl.int64) * (K * V) + offsets, grad, mask=inside)
    if DECAYS:
        tl.store(d_log_decay + program, scale * tl.sum(d_log, axis=0) + tl.sum(d_end, axis=0))
