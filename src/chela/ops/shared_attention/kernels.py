"""Triton kernels of attention over a shared representation, over all tokens.

Shapes: B rows of T tokens, H heads of width HV (V = H HV), K keys; a program has C tokens, BK >= K and BV columns of a
head's values. With S = silu(shared), q = S a + b, k = S c + d (zero where masked) and v = silu(values), all made where
they are needed:

    A = sum_t k_t v_t^T  [K, HV]        m_t = scale q_t A

and for a gradient g of m, with E = sum_t q_t g_t^T,

    dq = scale g A^T        dk = scale v E^T        dv = scale k E

The number of tokens is never a constant of a kernel.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(x_rows, column, there, W: tl.constexpr, BW: tl.constexpr):
    """Columns `column : column + BW` of rows of x, as far as they lie in a part W wide; zero outside."""
    w = tl.arange(0, BW)
    inside = there
    if W % BW != 0:
        inside = there & (w < W - column % W)[None, :]
    return tl.load(x_rows + (column + w)[None, :], mask=inside, other=0.0)


@triton.jit
def _vector(pointer, head, K: tl.constexpr, BK: tl.constexpr):
    """A head's parameters [1, BK] in float32."""
    k = tl.arange(0, BK)
    return tl.load(pointer + head * K + k, mask=k < K, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _state(pointer, column, K: tl.constexpr, HV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Columns of A or E [BK, BV]."""
    k, v = tl.arange(0, BK)[:, None], tl.arange(0, BV)[None, :]
    return tl.load(pointer + k * HV + (column + v), mask=(k < K) & (v < HV - column), other=0.0)


@triton.jit(do_not_specialize=["length", "splits"])
def sum_states(
    sums_ptr,  # [B, H, splits, K, HV] float32
    shared_ptr,  # [B T, K], rows shared_row apart
    right_ptr,  # [B T, V], rows right_row apart: values, or the gradient of m
    gain_ptr,  # [H, K]
    bias_ptr,  # [H, K]
    mask_ptr,  # [B T]
    length,
    splits,
    shared_row,
    right_row,
    H: tl.constexpr,
    K: tl.constexpr,
    HV: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A over the tokens of a split, from keys and values; without KEYS E, from queries and gradients."""
    tiles: tl.constexpr = (HV + BV - 1) // BV
    program = tl.program_id(0)
    column = (program % tiles) * BV
    split = (program // tiles) % splits
    row = program // (tiles * splits)
    head = row % H
    first = (row // H).to(tl.int64) * length
    share = tl.cdiv(tl.cdiv(length, splits), C) * C
    begin = split * share
    gain, bias = _vector(gain_ptr, head, K, BK), _vector(bias_ptr, head, K, BK)
    state = tl.zeros([BK, BV], tl.float32)
    for t in tl.range(begin, tl.minimum(begin + share, length), C, num_stages=STAGES):
        token = t + tl.arange(0, C)
        there = (token < length)[:, None]
        at = (first + token)[:, None]
        s = _tile(shared_ptr + at * shared_row, 0, there, K, BK).to(tl.float32)
        right = _tile(right_ptr + at * right_row, head * HV + column, there, HV, BV)
        left = s * tl.sigmoid(s) * gain + bias
        if KEYS:
            x = right.to(tl.float32)
            right = (x * tl.sigmoid(x)).to(right.dtype)
            if MASKED:
                left = tl.where(tl.load(mask_ptr + at, mask=there, other=0) != 0, left, 0.0)
        state = tl.dot(tl.trans(left.to(right.dtype)), right, state, input_precision="tf32x3")  # [BK, BV]
    k, v = tl.arange(0, BK)[:, None], column + tl.arange(0, BV)[None, :]
    sums_row = sums_ptr + (row.to(tl.int64) * splits + split) * (K * HV)
    tl.store(sums_row + k * HV + v, state, mask=(k < K) & (v < HV))


@triton.jit(do_not_specialize=["length"])
def attend(
    m_ptr,  # [B T, V]
    shared_ptr,  # [B T, K], rows shared_row apart
    state_ptr,  # [B, H, K, HV]: A
    gain_ptr,  # [H, K], as bias
    bias_ptr,
    scale,
    length,
    shared_row,
    H: tl.constexpr,
    K: tl.constexpr,
    HV: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Output: m = scale q A."""
    tiles: tl.constexpr = (HV + BV - 1) // BV
    column = (tl.program_id(0) % tiles) * BV
    row = tl.program_id(0) // tiles
    head = row % H
    token = tl.program_id(1) * C + tl.arange(0, C)
    there = (token < length)[:, None]
    at = ((row // H).to(tl.int64) * length + token)[:, None]
    s = _tile(shared_ptr + at * shared_row, 0, there, K, BK).to(tl.float32)
    state = _state(state_ptr + row.to(tl.int64) * (K * HV), column, K, HV, BK, BV)
    q = s * tl.sigmoid(s) * _vector(gain_ptr, head, K, BK) + _vector(bias_ptr, head, K, BK)
    m = tl.dot(q.to(state.dtype), state, input_precision="tf32x3") * scale  # [C, BV]
    v = column + tl.arange(0, BV)[None, :]
    tl.store(m_ptr + at * (H * HV) + head * HV + v, m.to(m_ptr.dtype.element_ty), mask=there & (v < HV))


@triton.jit(do_not_specialize=["length"])
def differentiate(
    dshared_ptr,  # [B T, K]
    dvalues_ptr,  # [B T, V]
    partial_ptr,  # [programs, 4, H, K] float32: each program's share of the gradients of a, b, c and d
    g_ptr,  # [B T, V], rows g_row apart: gradient of m
    shared_ptr,  # [B T, K], rows shared_row apart
    values_ptr,  # [B T, V], rows values_row apart
    a_state_ptr,  # [B, H, K, HV]: A
    e_state_ptr,  # [B, H, K, HV]: E
    q_gain_ptr,  # [H, K], as the other three
    k_gain_ptr,
    k_bias_ptr,
    mask_ptr,  # [B T]
    scale,
    length,
    g_row,
    shared_row,
    values_row,
    H: tl.constexpr,
    K: tl.constexpr,
    HV: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of shared and values, and the parameters' shares: all heads of C tokens of a row."""
    row = tl.program_id(1).to(tl.int64)
    program = row * tl.num_programs(0) + tl.program_id(0)
    token = tl.program_id(0) * C + tl.arange(0, C)
    there = (token < length)[:, None]
    at = (row * length + token)[:, None]
    k, v = tl.arange(0, BK), tl.arange(0, BV)
    s = _tile(shared_ptr + at * shared_row, 0, there, K, BK).to(tl.float32)
    opened = tl.sigmoid(s)
    basis = s * opened
    counts = there
    if MASKED:
        counts = there & (tl.load(mask_ptr + at, mask=there, other=0) != 0)
    dbasis = tl.zeros([C, BK], tl.float32)
    for head in range(H):
        states = (row * H + head) * (K * HV)
        k_gain = _vector(k_gain_ptr, head, K, BK)
        keys = tl.where(counts, basis * k_gain + _vector(k_bias_ptr, head, K, BK), 0.0).to(g_ptr.dtype.element_ty)
        dq, dk = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        for column in tl.range(0, HV, BV, num_stages=STAGES):
            g = _tile(g_ptr + at * g_row, head * HV + column, there, HV, BV)
            x = _tile(values_ptr + at * values_row, head * HV + column, there, HV, BV).to(tl.float32)
            a = _state(a_state_ptr + states, column, K, HV, BK, BV)
            e = _state(e_state_ptr + states, column, K, HV, BK, BV)
            gate = tl.sigmoid(x)
            dq = tl.dot(g, tl.trans(a), dq, input_precision="tf32x3")  # [C, BK]
            dk = tl.dot((x * gate).to(g.dtype), tl.trans(e), dk, input_precision="tf32x3")  # [C, BK]
            dv = tl.dot(keys, e, input_precision="tf32x3") * scale  # [C, BV]
            dv *= gate * (1 + x * (1 - gate))
            inside = there & (v < HV - column)[None, :]
            to = dvalues_ptr + at * (H * HV) + (head * HV + column + v)[None, :]
            tl.store(to, dv.to(dvalues_ptr.dtype.element_ty), mask=inside)
        dq *= scale
        dk = tl.where(counts, dk * scale, 0.0)
        share = partial_ptr + (program * (4 * H) + head) * K + k
        tl.store(share, tl.sum(dq * basis, axis=0), mask=k < K)
        tl.store(share + H * K, tl.sum(dq, axis=0), mask=k < K)
        tl.store(share + 2 * H * K, tl.sum(dk * basis, axis=0), mask=k < K)
        tl.store(share + 3 * H * K, tl.sum(dk, axis=0), mask=k < K)
        dbasis += dq * _vector(q_gain_ptr, head, K, BK) + dk * k_gain
    dshared = dbasis * opened * (1 + s * (1 - opened))
    to = dshared_ptr + at * K + k[None, :]
    tl.store(to, dshared.to(dshared_ptr.dtype.element_ty), mask=there & (k < K)[None, :])
