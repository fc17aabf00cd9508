"""Triton kernels of one token in a block: what stands between its matrix products, each chain one launch.

Rows are those of the batch, few of them. The stream of residuals x is float32; y and the other inputs of products have
the products' dtype; all is computed in float32. States are changed in place.
"""

import triton.language as tl

from chela.ops.launch import jit


@jit()
def normed(x, real, gain, shift, c, D: tl.constexpr, NORM: tl.constexpr, LOWEST: tl.constexpr):
    """Normalise x [ROW] over its D real entries."""
    g = tl.load(gain + (c * 0 if NORM == "scale" else c), mask=real, other=0).to(tl.float32)
    if NORM == "layer":
        x = tl.where(real, x - tl.sum(x, 0) / D, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / D + LOWEST) * g
    if NORM == "layer":
        y += tl.load(shift + c, mask=real, other=0).to(tl.float32)
    return y


@jit()
def add_norm(
    x, more, gain, shift, x_out, y_out, D: tl.constexpr, ROW: tl.constexpr, NORM: tl.constexpr, LOWEST: tl.constexpr
):  # fmt: skip
    """Add and norm, x' = x + more, y = norm(x'): a program a row."""
    c = tl.arange(0, ROW)
    real = c < D
    at = tl.program_id(0).to(tl.int64) * D + c
    row = tl.load(x + at, mask=real, other=0).to(tl.float32) + tl.load(more + at, mask=real, other=0).to(tl.float32)
    tl.store(x_out + at, row, mask=real)
    y = normed(row, real, gain, shift, c, D, NORM, LOWEST)
    tl.store(y_out + at, y.to(y_out.dtype.element_ty), mask=real)


@jit("epoch")
def convolve(
    x, more, gain, shift, short, weight, bias, inputs, pending, near, position, long_bias, x_out, y_out, z_out, epoch,
    D: tl.constexpr, ROW: tl.constexpr, NORM: tl.constexpr, LOWEST: tl.constexpr, PAST: tl.constexpr,
    TAPS: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, MORE: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Add, norm, convolve twice: y = norm(x + more), z = long_conv(silu(short_conv(y))).

    A program a row and CHANNELS of it. Each takes the statistics of its whole row again: D numbers are read sooner than
    another launch begins. The last W - 1 = PAST inputs move up by one in `short`; the long stage is that of
    `long_conv.online`.
    """
    c = tl.arange(0, ROW)
    b = tl.program_id(1).to(tl.int64)
    row = tl.load(x + b * D + c, mask=c < D, other=0).to(tl.float32)
    if MORE:
        row += tl.load(more + b * D + c, mask=c < D, other=0).to(tl.float32)
    if NORM == "layer":
        mean = tl.sum(row, 0) / D
        row = tl.where(c < D, row - mean, 0.0)
    scale = tl.rsqrt(tl.sum(row * row, 0) / D + LOWEST)

    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = d < D
    now = tl.load(x + b * D + d, mask=real, other=0).to(tl.float32)  # [CHANNELS]
    if MORE:
        now += tl.load(more + b * D + d, mask=real, other=0).to(tl.float32)
        tl.store(x_out + b * D + d, now, mask=real)
    if NORM == "layer":
        now -= mean
    y = now * scale * tl.load(gain + (d * 0 if NORM == "scale" else d), mask=real, other=0).to(tl.float32)
    if NORM == "layer":
        y += tl.load(shift + d, mask=real, other=0).to(tl.float32)
    y = y.to(y_out.dtype.element_ty)
    tl.store(y_out + b * D + d, y, mask=real)
    y = y.to(tl.float32)

    # short stage
    u = tl.load(bias + d, mask=real, other=0).to(tl.float32)
    u += y * tl.load(weight + d * (PAST + 1) + PAST, mask=real, other=0).to(tl.float32)
    if PAST > 0:
        n = tl.arange(0, TAPS)
        held = (n < PAST)[:, None] & real[None, :]  # [TAPS, CHANNELS]
        at = short + b * PAST * D + n[:, None] * D + d[None, :]
        before = tl.load(at, mask=held, other=0)
        taps = tl.load(weight + d[None, :] * (PAST + 1) + n[:, None], mask=held, other=0)
        u += tl.sum(before.to(tl.float32) * taps.to(tl.float32), 0)
        tl.debug_barrier()  # all has been read before any of it is overwritten
        tl.store(at - D, before, mask=held & (n > 0)[:, None])
        tl.store(short + (b * PAST + PAST - 1) * D + d, y.to(short.dtype.element_ty), mask=real)
    u = (u * tl.sigmoid(u)).to(inputs.dtype.element_ty)

    # long stage: out_t = pending_t + sum_{l = 0}^{t mod R} kernel_l u_{t-l}
    t = tl.load(position + b)
    first = b * epoch * D
    tl.store(inputs + first + t * D + d, u, mask=real)
    lag = tl.arange(0, BLOCK)
    # the present is at hand: it is not read from where it is just being written
    seen = ((lag >= 1) & (lag <= t % BLOCK))[:, None] & real[None, :]  # [BLOCK, CHANNELS]
    window = tl.load(inputs + first + (t - lag)[:, None] * D + d[None, :], mask=seen, other=0)
    kernel = tl.load(near + (BLOCK - 1 - lag)[:, None] * D + d[None, :], mask=seen, other=0)
    z = tl.load(pending + first + t * D + d, mask=real, other=0)
    z += tl.load(near + (BLOCK - 1) * D + d, mask=real, other=0) * u.to(tl.float32)
    z += tl.sum(window.to(tl.float32) * kernel, 0)
    if BIASED:
        z += tl.load(long_bias + d, mask=real, other=0).to(tl.float32)
    tl.store(z_out + b * D + d, z.to(z_out.dtype.element_ty), mask=real)


@jit()
def attend(
    mixed, values, q_gain, q_bias, k_gain, k_bias, decay, norm_gain, state, out, scale, mixed_row,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    DECAYS: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """S = decay S + k v^T and out = silu(gate) * norm(scale q S): a program a head of a row, KEYS rows of S at a time.

    q, k = silu(shared) * gain + bias and v = silu(values); `mixed` begins with K columns `shared`, then the gate.
    """
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    j = tl.arange(0, VALUES)
    value = j < V
    v = tl.load(values + (b * HEADS + h) * V + j, mask=value, other=0).to(tl.float32)
    v *= tl.sigmoid(v)
    gate = tl.load(mixed + b * mixed_row + K + h * V + j, mask=value, other=0).to(tl.float32)
    decayed = tl.load(decay + h) if DECAYS else 1.0

    m = tl.zeros([VALUES], tl.float32)
    for first in tl.static_range(0, K, KEYS):
        i = first + tl.arange(0, KEYS)
        key = i < K
        shared = tl.load(mixed + b * mixed_row + i, mask=key, other=0).to(tl.float32)
        shared *= tl.sigmoid(shared)
        q = shared * tl.load(q_gain + h * K + i, mask=key, other=0) + tl.load(q_bias + h * K + i, mask=key, other=0)
        k = shared * tl.load(k_gain + h * K + i, mask=key, other=0) + tl.load(k_bias + h * K + i, mask=key, other=0)
        at = state + (b * HEADS + h) * K * V + i[:, None] * V + j[None, :]
        held = key[:, None] & value[None, :]
        s = tl.load(at, mask=held, other=0) * decayed + k[:, None] * v[None, :]  # [KEYS, VALUES]
        tl.debug_barrier()  # all has been read before any of it is overwritten
        tl.store(at, s, mask=held)
        m += tl.sum(q[:, None] * s, 0)
    m *= scale
    if NORMED:
        m *= tl.rsqrt(tl.sum(m * m, 0) / V + 1e-6) * tl.load(norm_gain + h * V + j, mask=value, other=0)
    m *= gate * tl.sigmoid(gate)
    tl.store(out + (b * HEADS + h) * V + j, m.to(out.dtype.element_ty), mask=value)


@jit()
def gate(
    mixed, out, x, gain, shift, x_out, y_out, mixed_row, first,
    D: tl.constexpr, ROW: tl.constexpr, NORM: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """Mix, x' = x + sigmoid(p) (silu(h + out) - x), and y = norm(x'): a program a row.

    h and p are columns of `mixed` from `first` on.
    """
    c = tl.arange(0, ROW)
    real = c < D
    b = tl.program_id(0).to(tl.int64)
    h = tl.load(mixed + b * mixed_row + first + c, mask=real, other=0).to(tl.float32)
    p = tl.load(mixed + b * mixed_row + first + D + c, mask=real, other=0).to(tl.float32)
    h += tl.load(out + b * D + c, mask=real, other=0).to(tl.float32)
    before = tl.load(x + b * D + c, mask=real, other=0)
    row = before + tl.sigmoid(p) * (h * tl.sigmoid(h) - before)
    tl.store(x_out + b * D + c, row, mask=real)
    if NORM != "none":
        y = normed(row, real, gain, shift, c, D, NORM, LOWEST)
        tl.store(y_out + b * D + c, y.to(y_out.dtype.element_ty), mask=real)


@jit("rows", "outputs")
def product(
    x, weight, bias, out, rows, outputs,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr, BOUNDED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Multiply, activation(x W^T + b), by rows so few that the time is that of reading W: a program BLOCK_N outputs.

    "swiglu" is silu(g) u, g and u the halves of x W^T + b; BOUNDED, silu(g) tanh(u).
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, ROWS)
    real = n < outputs
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    up = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for first in range(0, WIDTH, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        part = tl.load(x + r[:, None] * WIDTH + k[None, :], mask=(r < rows)[:, None] & (k < WIDTH)[None, :], other=0)
        part = part.to(tl.float32)[:, None, :]  # [ROWS, 1, BLOCK_K]
        at = weight + n[:, None] * WIDTH + k[None, :]
        held = real[:, None] & (k < WIDTH)[None, :]
        w = tl.load(at, mask=held, other=0)  # [BLOCK_N, BLOCK_K]
        total += tl.sum(part * w.to(tl.float32)[None, :, :], 2)
        if ACTIVATION == "swiglu":
            w = tl.load(at + outputs * WIDTH, mask=held, other=0)
            up += tl.sum(part * w.to(tl.float32)[None, :, :], 2)
    if BIASED:
        total += tl.load(bias + n, mask=real, other=0).to(tl.float32)[None, :]
        if ACTIVATION == "swiglu":
            up += tl.load(bias + outputs + n, mask=real, other=0).to(tl.float32)[None, :]
    if ACTIVATION != "none":
        total *= tl.sigmoid(total)
    if ACTIVATION == "swiglu":
        total *= 2 * tl.sigmoid(2 * up) - 1 if BOUNDED else up
    at = out + r[:, None] * outputs + n[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(r < rows)[:, None] & real[None, :])


@jit("width")
def swiglu(gate_up, out, width, COLUMNS: tl.constexpr, BOUNDED: tl.constexpr):
    """silu(gate) * up, or the tanh of up: a program a row and COLUMNS of it."""
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = c < width
    g = tl.load(gate_up + b * 2 * width + c, mask=real, other=0).to(tl.float32)
    up = tl.load(gate_up + b * 2 * width + width + c, mask=real, other=0).to(tl.float32)
    if BOUNDED:
        up = 2 * tl.sigmoid(2 * up) - 1
    tl.store(out + b * width + c, (g * tl.sigmoid(g) * up).to(out.dtype.element_ty), mask=real)
