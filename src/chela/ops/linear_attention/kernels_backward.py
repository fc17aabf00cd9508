"""Triton kernels of the backward pass of causal linear attention; shapes and words as in `kernels`.

With g_t the gradient of out_t, a decay d per head, S the state before a chunk and R, the gradient of the state behind
it over `scale`:

    dq_t = scale (sum_{s <= t} d^(t-s) (g_t . v_s) k_s + d^(t+1) S g_t)
    dk_s = scale (sum_{t >= s} d^(t-s) (g_t . v_s) q_t + d^(end-1-s) R v_s)
    dv_s = scale (sum_{t >= s} d^(t-s) (q_t . k_s) g_t + d^(end-1-s) R^T k_s)

R comes from the end and S from the front, so there are two walks: `key_value_gradients` backwards, `query_gradients`
forwards. Where `kernels_one_walk` can take the place of both, it does.

A state is as wide as V, since dq and dk sum over all values: it is kept as BLOCKS blocks of BV columns, each a tensor
of its own, so that no product has a result wider than that. Where V is wider still, groups of blocks go to programs
of their own, each gives a part of dq and dk, and `sum_groups` adds these up.
"""

import triton
import triton.language as tl

from chela.ops.linear_attention.kernels import (
    jit,
    load_tile,
    power,
    row_span,
    row_start,
    split_span,
    store_tile,
)


@triton.jit
def load_state(x, column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
               BLOCKS: tl.constexpr, TRANSPOSED: tl.constexpr, LOADS: tl.constexpr):  # fmt: skip
    """Blocks of columns of a state [K, V]: [BK, BV] each, TRANSPOSED [BV, BK]; zeros unless LOADS."""
    if TRANSPOSED:
        k = tl.arange(0, BK)[None, :]
        v = column + tl.arange(0, BV)[:, None]
    else:
        k = tl.arange(0, BK)[:, None]
        v = column + tl.arange(0, BV)[None, :]
    blocks = ()
    for j in tl.static_range(BLOCKS):
        if LOADS:
            inside = (k < K) & (v + j * BV < V)
            blocks = blocks + (tl.load(x + k * V + v + j * BV, mask=inside, other=0.0).to(tl.float32),)
        elif TRANSPOSED:
            blocks = blocks + (tl.zeros([BV, BK], tl.float32),)
        else:
            blocks = blocks + (tl.zeros([BK, BV], tl.float32),)
    return blocks


@triton.jit
def programs_place(heads, splits, V: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr):
    """Group of columns, split, sequence and head of this program, and row = sequence * heads + head."""
    groups: tl.constexpr = (V + BV * BLOCKS - 1) // (BV * BLOCKS)
    program = tl.program_id(0)
    row = program // (groups * splits)
    return program % groups, (program // groups) % splits, row // heads, row % heads, row


@jit("q", "k", "v", "g")
def key_value_gradients(
    q, k, v, g, dk, dv, ends, d_start, log2_decay, cu_seqlens,
    scale, length, heads, splits, unit, tokens_in_all,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr, C: tl.constexpr,
    ALIGN: tl.constexpr, DECAYS: tl.constexpr, PACKED: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Write dk (a part for each group), dv and d_start."""
    group, split, n, h, row = programs_place(heads, splits, V, BV, BLOCKS)
    column = group * (BV * BLOCKS)
    first, size = row_span(cu_seqlens, n, length, PACKED)
    begin, end = split_span(size, split, splits, unit)
    if (split > 0) & (begin >= size):
        return
    q_row = row_start(q, first, n, h, q_b, q_t, q_h, ALIGN, PACKED)
    k_row = row_start(k, first, n, h, k_b, k_t, k_h, ALIGN, PACKED)
    v_row = row_start(v, first, n, h, v_b, v_t, v_h, ALIGN, PACKED)
    g_row = row_start(g, first, n, h, g_b, g_t, g_h, ALIGN, PACKED)
    dk_row = dk + ((group.to(tl.int64) * tokens_in_all + first) * heads + h) * K
    dv_row = dv + (first * heads + h) * V
    at_end = ends + (row.to(tl.int64) * splits + split) * (K * V) if ENDS else ends
    grads = load_state(at_end, column, K, V, BK, BV, BLOCKS, False, ENDS)  # R
    place = tl.arange(0, C)
    lag = place[None, :] - place[:, None]  # [C of s, C of t]
    if DECAYS:
        log2_d = tl.load(log2_decay + h)
        weight = power(log2_d, lag)
        from_start = power(log2_d, place + 1)[:, None]
    chunks = tl.cdiv(tl.maximum(end - begin, 0), C)
    for i in range(chunks):
        t = begin + (chunks - 1 - i) * C
        q_c = load_tile(q_row, t, end, q_t * ALIGN, 0, K, BK, C)  # [C, BK]
        k_c = load_tile(k_row, t, end, k_t * ALIGN, 0, K, BK, C)  # [C, BK]
        scores = tl.dot(k_c, tl.trans(q_c), input_precision="tf32x3")  # [C of s, C of t]
        q_late = q_c
        if DECAYS:
            scores *= weight
            tokens = tl.minimum(end - t, C)
            to_end = power(log2_d, tokens - 1 - place)[:, None]
            kept = power(log2_d, tokens)
            q_late = (q_c * from_start).to(q_c.dtype)
        scores = tl.where(lag >= 0, scores, 0.0).to(q_c.dtype)
        d_k = tl.zeros([C, BK], tl.float32)
        d_scores = tl.zeros([C, C], tl.float32)  # [C of s, C of t]
        new_grads = ()
        for j in tl.static_range(BLOCKS):
            v_c = load_tile(v_row, t, end, v_t * ALIGN, column + j * BV, V, BV, C)  # [C, BV]
            g_c = load_tile(g_row, t, end, g_t * ALIGN, column + j * BV, V, BV, C)  # [C, BV]
            low = grads[j].to(g_c.dtype)
            d_v = tl.dot(k_c, low, input_precision="tf32x3")  # [C, BV]
            if DECAYS:
                d_v *= to_end
            d_v = tl.dot(scores, g_c, d_v, input_precision="tf32x3")
            store_tile(dv_row, d_v * scale, t, end, heads * V, column + j * BV, V, BV, C)
            d_k = tl.dot(v_c, tl.trans(low), d_k, input_precision="tf32x3")
            d_scores = tl.dot(v_c, tl.trans(g_c), d_scores, input_precision="tf32x3")
            grad = grads[j]
            if DECAYS:
                grad *= kept
            new_grads = new_grads + (tl.dot(tl.trans(q_late), g_c, grad, input_precision="tf32x3"),)  # [BK, BV]
        grads = new_grads
        if DECAYS:
            d_k *= to_end
            d_scores *= weight
        d_scores = tl.where(lag >= 0, d_scores, 0.0)
        d_k = tl.dot(d_scores.to(q_c.dtype), q_c, d_k, input_precision="tf32x3")
        store_tile(dk_row, d_k * scale, t, end, heads * K, 0, K, BK, C)
    if STARTS:
        if split == 0:
            k_place = tl.arange(0, BK)[:, None]
            v_place = column + tl.arange(0, BV)[None, :]
            start = d_start + row.to(tl.int64) * (K * V) + k_place * V + v_place
            for j in tl.static_range(BLOCKS):
                tl.store(start + j * BV, grads[j] * scale, mask=(k_place < K) & (v_place + j * BV < V))


@jit("q", "k", "v", "g")
def query_gradients(
    q, k, v, g, dq, starts, ends, saved, d_log_decay, log2_decay, cu_seqlens,
    scale, length, heads, splits, unit, period, slots, tokens_in_all,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr, C: tl.constexpr,
    ALIGN: tl.constexpr, DECAYS: tl.constexpr, PACKED: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Write dq (a part for each group) and d_log_decay [programs], the gradient of the decay's natural logarithm."""
    group, split, n, h, row = programs_place(heads, splits, V, BV, BLOCKS)
    column = group * (BV * BLOCKS)
    first, size = row_span(cu_seqlens, n, length, PACKED)
    begin, end = split_span(size, split, splits, unit)
    if begin >= size:
        return
    q_row = row_start(q, first, n, h, q_b, q_t, q_h, ALIGN, PACKED)
    k_row = row_start(k, first, n, h, k_b, k_t, k_h, ALIGN, PACKED)
    v_row = row_start(v, first, n, h, v_b, v_t, v_h, ALIGN, PACKED)
    g_row = row_start(g, first, n, h, g_b, g_t, g_h, ALIGN, PACKED)
    dq_row = dq + ((group.to(tl.int64) * tokens_in_all + first) * heads + h) * K
    # The state, transposed: no operand of a product below is a transposed accumulator.
    states = load_state(saved, column, K, V, BK, BV, BLOCKS, True, False)
    if split > 0:
        if PACKED:
            slot = first // period + n
        else:
            slot = n.to(tl.int64) * slots
        before = saved + ((slot + begin // period - 1) * heads + h) * (K * V)
        states = load_state(before, column, K, V, BK, BV, BLOCKS, True, True)
    else:
        if STARTS:
            states = load_state(starts + row.to(tl.int64) * (K * V), column, K, V, BK, BV, BLOCKS, True, True)
    place = tl.arange(0, C)
    lag = place[:, None] - place[None, :]  # [C of t, C of s]
    if DECAYS:
        log2_d = tl.load(log2_decay + h)
        weight = power(log2_d, lag)
        from_start = power(log2_d, place + 1)[:, None]
        d_log = tl.zeros([C], tl.float32)
        slopes = load_state(saved, column, K, V, BK, BV, BLOCKS, True, False)  # of S by log d, lags from `begin` on
    for t in range(begin, end, C):
        k_c = load_tile(k_row, t, end, k_t * ALIGN, 0, K, BK, C)  # [C, BK]
        k_late = k_c
        if DECAYS:
            tokens = tl.minimum(end - t, C)
            after = tokens - 1 - place
            kept = power(log2_d, tokens)
            to_end = power(log2_d, after)
            k_late = (k_c * to_end[:, None]).to(k_c.dtype)
            k_slope = (k_c * (tl.maximum(after, 0) * to_end)[:, None]).to(k_c.dtype)
            through = tl.zeros([C, BK], tl.float32)
        d_scores = tl.zeros([C, C], tl.float32)
        d_q = tl.zeros([C, BK], tl.float32)
        new_states, new_slopes = (), ()
        for j in tl.static_range(BLOCKS):
            v_c = load_tile(v_row, t, end, v_t * ALIGN, column + j * BV, V, BV, C)  # [C, BV]
            g_c = load_tile(g_row, t, end, g_t * ALIGN, column + j * BV, V, BV, C)  # [C, BV]
            d_scores = tl.dot(g_c, tl.trans(v_c), d_scores, input_precision="tf32x3")
            d_q = tl.dot(g_c, states[j].to(g_c.dtype), d_q, input_precision="tf32x3")
            state = states[j]
            if DECAYS:
                through = tl.dot(g_c, slopes[j].to(g_c.dtype), through, input_precision="tf32x3")
                slope = (slopes[j] + tokens * state) * kept
                new_slopes = new_slopes + (tl.dot(tl.trans(v_c), k_slope, slope, input_precision="tf32x3"),)
                state *= kept
            new_states = new_states + (tl.dot(tl.trans(v_c), k_late, state, input_precision="tf32x3"),)  # [BV, BK]
        states = new_states
        if DECAYS:
            slopes = new_slopes
            d_scores *= weight
            d_q *= from_start
            q_c = load_tile(q_row, t, end, q_t * ALIGN, 0, K, BK, C)  # [C, BK]
            scores = tl.dot(q_c, tl.trans(k_c), input_precision="tf32x3")
            d_log += tl.sum(tl.where(lag >= 0, lag * scores * d_scores, 0.0), axis=1)
            d_log += tl.sum(q_c * ((place + 1)[:, None] * d_q + through * from_start), axis=1)
        d_scores = tl.where(lag >= 0, d_scores, 0.0)
        d_q = tl.dot(d_scores.to(k_c.dtype), k_c, d_q, input_precision="tf32x3")
        store_tile(dq_row, d_q * scale, t, end, heads * K, 0, K, BK, C)
    if DECAYS:
        total = tl.sum(d_log, axis=0)
        if ENDS:  # through the state behind the split
            at_end = ends + (row.to(tl.int64) * splits + split) * (K * V)
            grads = load_state(at_end, column, K, V, BK, BV, BLOCKS, True, True)
            for j in tl.static_range(BLOCKS):
                total += tl.sum(tl.sum(grads[j] * slopes[j], axis=1), axis=0)
        tl.store(d_log_decay + tl.program_id(0), total * scale)


@jit()
def sum_groups(dq_parts, dk_parts, dq, dk, entries, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the parts [GROUPS, entries] of dq and of dk that the groups of columns gave."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < entries
    d_q = tl.zeros([BLOCK], tl.float32)
    d_k = tl.zeros([BLOCK], tl.float32)
    for group in tl.static_range(GROUPS):
        here = place + tl.cast(entries, tl.int64) * group
        d_q += tl.load(dq_parts + here, mask=inside, other=0.0).to(tl.float32)
        d_k += tl.load(dk_parts + here, mask=inside, other=0.0).to(tl.float32)
    tl.store(dq + place, d_q.to(dq.dtype.element_ty), mask=inside)
    tl.store(dk + place, d_k.to(dk.dtype.element_ty), mask=inside)
