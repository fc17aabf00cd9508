"""Triton kernels that sum states, scan them, or multiply every token with one; shapes and words as in `kernels`."""

import triton
import triton.language as tl

from chela.ops.activation_kernels import sigmoid, silu
from chela.ops.linear_attention.kernels import (
    jit,
    load_tile,
    power,
    row_span,
    row_start,
    split_span,
    state_tile,
    store_tile,
)


@jit("k", "v")
def state_sums(
    k, v, sums, log2_decay, cu_seqlens,
    length, heads, splits, unit,
    k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr,
    DECAYS: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr, ALL: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """What each split adds to the state behind it, or, BACKWARD, to the gradient of the state before it.

    That is sum_s g^(end-1-s) k_s v_s^T, BACKWARD with g^(s-begin+1), and silu(v) in v's place if SILU. Without ALL, the
    split that no other one follows is left out.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    column = (program % tiles) * BV
    split = (program // tiles) % splits
    row = program // (tiles * splits)
    n = row // heads
    h = row % heads
    if not ALL:
        if BACKWARD:
            if split == 0:
                return
        else:
            if split == splits - 1:
                return
    first, size = row_span(cu_seqlens, n, length, PACKED)
    begin, end = split_span(size, split, splits, unit)
    k_row = row_start(k, first, n, h, k_b, k_t, k_h, ALIGN, PACKED)
    v_row = row_start(v, first, n, h, v_b, v_t, v_h, ALIGN, PACKED)
    place = tl.arange(0, C)
    if DECAYS:
        log2_g = tl.load(log2_decay + h)
    state = tl.zeros([BK, BV], tl.float32)
    for i in range(tl.cdiv(tl.maximum(end - begin, 0), C)):
        if BACKWARD:
            t = begin + (tl.cdiv(end - begin, C) - 1 - i) * C
        else:
            t = begin + i * C
        k_c = load_tile(k_row, t, end, k_t * ALIGN, 0, K, BK, C)  # [C, BK]
        v_c = load_tile(v_row, t, end, v_t * ALIGN, column, V, BV, C)  # [C, BV]
        if SILU:
            v_c = silu(v_c)
        if DECAYS:
            tokens = tl.minimum(end - t, C)
            if BACKWARD:
                lag = place + 1
            else:
                lag = tokens - 1 - place
            k_c = (k_c * power(log2_g, lag)[:, None]).to(v_c.dtype)
            state *= power(log2_g, tokens)
        state = tl.dot(tl.trans(k_c), v_c, state, input_precision="tf32x3")  # [BK, BV]
    offsets, inside = state_tile(column, K, V, BK, BV)
    sums_row = sums + (row.to(tl.int64) * splits + split) * (K * V)
    tl.store(sums_row + offsets, state, mask=inside)


@jit()
def scan_states(
    sums, start, log2_decay, cu_seqlens, length, heads, splits, unit,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
    DECAYS: tl.constexpr, PACKED: tl.constexpr, STARTS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Turn what each split adds into the state before it (BACKWARD: the state's gradient behind it), in place."""
    row = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE
    _, size = row_span(cu_seqlens, row // heads, length, PACKED)
    state = tl.zeros([BLOCK], tl.float32)
    if STARTS:
        state += tl.load(start + row.to(tl.int64) * SIZE + place, mask=inside, other=0.0)
    if DECAYS:
        log2_g = tl.load(log2_decay + row % heads)
    for several in range(0, splits, AHEAD):
        added = ()
        for j in tl.static_range(AHEAD):  # all on their way before the first is needed
            i = several + j
            here = sums + (row.to(tl.int64) * splits + (splits - 1 - i if BACKWARD else i)) * SIZE + place
            added = added + (tl.load(here, mask=inside & (i < splits - 1), other=0.0),)
        for j in tl.static_range(AHEAD):
            i = several + j
            split = splits - 1 - i if BACKWARD else i
            here = sums + (row.to(tl.int64) * splits + split) * SIZE + place
            tl.store(here, state, mask=inside & (i < splits))
            if DECAYS:
                begin, end = split_span(size, split, splits, unit)
                state *= power(log2_g, end - begin)
            state += added[j]


@triton.jit
def state_block(state, k, v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Rows k : k+BK and columns v [1, BV] of a state [K, V]; TRANSPOSED: stored [V, K]."""
    k += tl.arange(0, BK)[:, None]
    if TRANSPOSED:
        offsets = v * K + k
    else:
        offsets = k * V + v
    return tl.load(state + offsets, mask=(k < K) & (v < V), other=0.0)  # [BK, BV]


@jit("q", "v")
def times_state(
    q, v, state, out, scale, length, heads, unit, q_b, q_t, q_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr,
    TRANSPOSED: tl.constexpr, HELD: tl.constexpr, SILU: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """out_t = scale q_t S, with the same S [K, V] for all t; TRANSPOSED: S is stored [V, K].

    With SILU, silu(q) takes q's place; with SLOPE, the result is multiplied by silu'(v), v [T, V].
    A program has `unit` tokens. Its columns of S are HELD, read once for all of them, where there is room.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    column = (program % tiles) * BV
    row = program // tiles
    n = row // heads
    h = row % heads
    begin = tl.program_id(1) * unit
    end = tl.minimum(begin + unit, length)
    q_row = row_start(q, 0, n, h, q_b, q_t, q_h, ALIGN, False)
    out_row = out + (n.to(tl.int64) * length * heads + h) * V
    state_row = state + row.to(tl.int64) * (K * V)
    v_row = row_start(v, 0, n, h, v_b, v_t, v_h, ALIGN, False)
    columns = column + tl.arange(0, BV)[None, :]
    held = ()
    if HELD:
        for j in tl.static_range((K + BK - 1) // BK):
            held = held + (state_block(state_row, j * BK, columns, K, V, BK, TRANSPOSED).to(q.dtype.element_ty),)
    for t in range(begin, end, C):
        acc = tl.zeros([C, BV], tl.float32)
        if HELD:
            for j in tl.static_range((K + BK - 1) // BK):
                q_c = load_tile(q_row, t, end, q_t * ALIGN, j * BK, K, BK, C)  # [C, BK]
                if SILU:
                    q_c = silu(q_c)
                acc = tl.dot(q_c, held[j], acc, input_precision="tf32x3")
        else:
            for k in range(0, K, BK):
                q_c = load_tile(q_row, t, end, q_t * ALIGN, k, K, BK, C)  # [C, BK]
                if SILU:
                    q_c = silu(q_c)
                s_c = state_block(state_row, k, columns, K, V, BK, TRANSPOSED).to(q_c.dtype)
                acc = tl.dot(q_c, s_c, acc, input_precision="tf32x3")
        acc *= scale
        if SLOPE:
            v_c = load_tile(v_row, t, end, v_t * ALIGN, column, V, BV, C).to(tl.float32)
            open = sigmoid(v_c)
            acc *= open * (1 + v_c * (1 - open))
        store_tile(out_row, acc, t, end, heads * V, column, V, BV, C)
