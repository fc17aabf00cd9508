"""Short depthwise convolution in Triton.

Time is cut into stretches of C rows. A tile takes SEG stretches, of any batch rows or documents, and BLOCK_D channels,
and walks down all its stretches at once, one row of each at a time: tensors are [SEG, BLOCK_D], a thread owns a few
neighbouring channels of one stretch, and the last W-1 rows stay in its registers. So x is read once, every
pre-activation is computed once, and no number crosses threads until the weight's gradient is summed.

    pre_t = bias + sum_j w_j x_{t + j - left}       out_t = act(pre_t)            left = W-1-RIGHT taps into the past
    g_t = dy_t act'(pre_t)                        dw_j = sum_t g_t x_{t + j - left},  dbias = sum_t g_t
    dx_s = sum_j w_j g_{s + left - j}               for s < 0 these are the state's gradients

A document is a batch row of its own length: kernels know positions from 0 to `length` of a "sequence", which is a
batch row or a document, and read nothing outside of it but its state, positions -(W-1) to -1.

Row strides of inputs count units of ALIGN elements, a power of 2, so that the compiler knows how wide a load may be.
"""

import triton
import triton.language as tl


@triton.jit
def _stretches(cu_ptr, n, stretches, chunk, halvings, SEG: tl.constexpr, PACKED: tl.constexpr):
    """Find the tile's stretches: sequence, batch row, row of position 0 there, first position [SEG]; lengths apart.

    Sequence i owns the stretches from `stretches * i` on, packed from `cu[i] // C + i` on. That is never fewer than
    it needs, and at least one, which looks after its state; a stretch in excess begins behind the sequence's end.
    """
    stretch = tl.program_id(0) * SEG + tl.arange(0, SEG)
    if PACKED:
        low = tl.zeros([SEG], tl.int32)
        high = low + (n - 1)
        for _ in range(halvings):
            middle = (low + high + 1) // 2
            reached = tl.load(cu_ptr + middle) // chunk + middle <= stretch
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, middle - 1)
        start = tl.load(cu_ptr + low)
        return low, tl.zeros([SEG], tl.int64), start.to(tl.int64), (stretch - start // chunk - low) * chunk
    sequence = tl.minimum(stretch // stretches, n - 1)
    return sequence, sequence.to(tl.int64), tl.zeros([SEG], tl.int64), (stretch - sequence * stretches) * chunk


@triton.jit
def _lengths(cu_ptr, sequence, start, t, PACKED: tl.constexpr):
    if PACKED:
        return tl.load(cu_ptr + sequence + 1) - start.to(tl.int32)
    return tl.zeros_like(sequence) + t


@triton.jit
def _taps(weight_ptr, d, D: tl.constexpr, W: tl.constexpr):
    """The weight [D, W] as W rows [1, BLOCK_D], float32."""
    taps = ()
    for j in tl.static_range(W):
        tap = tl.load(weight_ptr + d * W + j, mask=d < D, other=0.0).to(tl.float32)
        taps = taps + (tap[None, :],)
    return taps


@triton.jit
def _row(
    x_tile,
    state_ptr,
    state_offset,
    position,
    length,
    inside,
    row_stride,
    D: tl.constexpr,
    W: tl.constexpr,
    STATE: tl.constexpr,
):
    """Rows at `position` [SEG] of x, of the state before it, and zeros elsewhere: [SEG, BLOCK_D] in x's dtype."""
    there = ((position >= 0) & (position < length))[:, None] & inside
    row = tl.load(x_tile + (position.to(tl.int64) * row_stride)[:, None], mask=there, other=0.0)
    if STATE:
        before = (position < 0)[:, None]
        offset = state_offset + ((position + (W - 1)) * D)[:, None]
        kept = tl.load(state_ptr + offset, mask=before & inside, other=0.0)
        row = tl.where(before, kept, row)
    return row


@triton.jit
def _convolve(window, taps, bias, W: tl.constexpr):
    acc = bias
    for j in tl.static_range(W):
        acc += taps[j] * window[j]
    return acc


@triton.jit(
    do_not_specialize=["n", "t", "stretches", "chunk", "halvings", "x_batch", "x_row"],
)
def short_conv_forward(
    out_ptr,  # [B, T, D]
    state_out_ptr,  # [N, W-1, D]
    x_ptr,  # [B, T, D], strides ALIGN * (x_batch, x_row), 1
    weight_ptr,  # [D, W]
    bias_ptr,  # [D]
    state_ptr,  # [N, W-1, D]
    cu_ptr,  # [N+1]
    n,
    t,
    stretches,
    chunk,
    halvings,
    x_batch,
    x_row,
    D: tl.constexpr,
    W: tl.constexpr,
    RIGHT: tl.constexpr,
    ALIGN: tl.constexpr,
    SILU: tl.constexpr,
    BIAS: tl.constexpr,
    STATE: tl.constexpr,
    STATE_OUT: tl.constexpr,
    PACKED: tl.constexpr,
    SEG: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Outputs and, asked for, the state after them."""
    sequence, batch, start, first = _stretches(cu_ptr, n, stretches, chunk, halvings, SEG, PACKED)
    length = _lengths(cu_ptr, sequence, start, t, PACKED)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (d < D)[None, :]
    stride = x_row * ALIGN
    x_tile = x_ptr + ((batch * x_batch + start * x_row) * ALIGN)[:, None] + d[None, :]  # position 0
    state_offset = (sequence.to(tl.int64) * ((W - 1) * D))[:, None] + d[None, :]

    taps = _taps(weight_ptr, d, D, W)
    bias = tl.zeros([SEG, BLOCK_D], tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    window = ()  # the W-1 rows before the one that the last tap meets, float32
    for k in tl.static_range(W - 1):
        position = first + (RIGHT - (W - 1) + k)
        row = _row(x_tile, state_ptr, state_offset, position, length, inside, stride, D, W, STATE)
        window = window + (row.to(tl.float32),)

    x_walk = x_tile + ((first.to(tl.int64) + RIGHT) * x_row * ALIGN)[:, None]
    out_walk = out_ptr + ((batch * t + start + first) * D)[:, None] + d[None, :]
    for block in tl.range(0, chunk, UNROLL, num_stages=STAGES):
        rows = ()
        for u in tl.static_range(UNROLL):  # loads first: several are in flight
            there = (first + (block + u + RIGHT) < length)[:, None] & inside
            rows = rows + (tl.load(x_walk + (block + u) * x_row * ALIGN, mask=there, other=0.0),)
        for u in tl.static_range(UNROLL):
            window = window + (rows[u].to(tl.float32),)
            out = _convolve(window, taps, bias, W)
            if SILU:
                out = out * tl.sigmoid(out)
            there = (first + (block + u) < length)[:, None] & inside
            tl.store(out_walk + (block + u) * D, out.to(out_ptr.dtype.element_ty), mask=there)
            window = window[1:]

    if STATE_OUT:  # by the sequence's first stretch, in ascending order: state_out may be the state's memory
        for k in tl.static_range(W - 1):
            position = length - (W - 1) + k
            row = _row(x_tile, state_ptr, state_offset, position, length, inside, stride, D, W, STATE)
            tl.store(state_out_ptr + state_offset + k * D, row, mask=(first == 0)[:, None] & inside)


@triton.jit(
    do_not_specialize=["n", "t", "stretches", "chunk", "halvings", "x_batch", "x_row", "dy_batch", "dy_row"],
)
def short_conv_backward(
    dx_ptr,  # [B, T, D]
    partial_ptr,  # [programs, W+1, D] float32: this program's share of dweight, then of dbias
    dstate_ptr,  # [N, W-1, D]
    dy_ptr,  # [B, T, D], strides ALIGN_DY * (dy_batch, dy_row), 1
    dstate_out_ptr,  # [N, W-1, D]
    x_ptr,  # [B, T, D], strides ALIGN * (x_batch, x_row), 1
    weight_ptr,  # [D, W]
    bias_ptr,  # [D]
    state_ptr,  # [N, W-1, D]
    cu_ptr,  # [N+1]
    n,
    t,
    stretches,
    chunk,
    halvings,
    x_batch,
    x_row,
    dy_batch,
    dy_row,
    D: tl.constexpr,
    W: tl.constexpr,
    RIGHT: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_DY: tl.constexpr,
    SILU: tl.constexpr,
    BIAS: tl.constexpr,
    STATE: tl.constexpr,
    DSTATE_OUT: tl.constexpr,
    PACKED: tl.constexpr,
    SEG: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of x and of the state, and the programs' shares of those of weight and bias."""
    sequence, batch, start, first = _stretches(cu_ptr, n, stretches, chunk, halvings, SEG, PACKED)
    length = _lengths(cu_ptr, sequence, start, t, PACKED)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (d < D)[None, :]
    stride = x_row * ALIGN
    x_tile = x_ptr + ((batch * x_batch + start * x_row) * ALIGN)[:, None] + d[None, :]  # position 0
    state_offset = (sequence.to(tl.int64) * ((W - 1) * D))[:, None] + d[None, :]

    taps = _taps(weight_ptr, d, D, W)
    bias = tl.zeros([SEG, BLOCK_D], tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    window = ()  # the W-1 rows of x before the walk's
    g_window = ()  # and of g: wrong before a stretch's first W-1 rows have passed, unless the sequence begins there
    sums = (tl.zeros([SEG, BLOCK_D], tl.float32),)  # dw_0, ... dw_{W-1}, dbias
    for k in tl.static_range(W - 1):
        position = first + (k - (W - 1))
        row = _row(x_tile, state_ptr, state_offset, position, length, inside, stride, D, W, STATE)
        window = window + (row.to(tl.float32),)
        g_window = g_window + (tl.zeros([SEG, BLOCK_D], tl.float32),)
    for _ in tl.static_range(W):
        sums = sums + (tl.zeros([SEG, BLOCK_D], tl.float32),)

    x_walk = x_tile + (first.to(tl.int64) * x_row * ALIGN)[:, None]
    dy_offset = batch * dy_batch + (start + first - RIGHT) * dy_row
    dy_walk = dy_ptr + (dy_offset * ALIGN_DY)[:, None] + d[None, :]
    dx_walk = dx_ptr + ((batch * t + start + first - (W - 1)) * D)[:, None] + d[None, :]
    surplus: tl.constexpr = (W - 1 + UNROLL - 1) // UNROLL * UNROLL
    # Step i of the walk takes row i of x, row i - RIGHT of dy and gives row i - (W-1) of dx, counted from `first`.
    for block in tl.range(0, chunk + surplus, UNROLL, num_stages=STAGES):
        rows = ()
        dys = ()
        for u in tl.static_range(UNROLL):
            step = block + u
            there = (first + step < length)[:, None] & inside
            rows = rows + (tl.load(x_walk + step * x_row * ALIGN, mask=there, other=0.0),)
            at = first + (step - RIGHT)
            there = ((at >= 0) & (at < length))[:, None] & inside
            dys = dys + (tl.load(dy_walk + step * dy_row * ALIGN_DY, mask=there, other=0.0),)
        for u in tl.static_range(UNROLL):
            step = block + u
            window = window + (rows[u].to(tl.float32),)
            g = dys[u].to(tl.float32)
            if SILU:
                pre = _convolve(window, taps, bias, W)
                gate = tl.sigmoid(pre)
                g *= gate * (1 + pre * (1 - gate))
            own = (step >= RIGHT) & (step < chunk + RIGHT)  # the rows of g that no other stretch counts
            counted = tl.where(own, g, 0.0)
            new_sums = ()
            for j in tl.static_range(W):
                new_sums = new_sums + (sums[j] + counted * window[j],)
            sums = new_sums + (sums[W] + counted,)
            window = window[1:]

            g_window = g_window + (g,)
            dx = taps[0] * g_window[W - 1]
            for j in tl.static_range(1, W):
                dx += taps[j] * g_window[W - 1 - j]
            g_window = g_window[1:]
            if DSTATE_OUT:  # the last W-1 rows were handed on as state
                kept = first + step - length
                there = ((kept >= 0) & (kept < W - 1))[:, None] & inside
                dx += tl.load(dstate_out_ptr + state_offset + (kept * D)[:, None], mask=there, other=0.0).to(tl.float32)
            if STATE:
                there = ((first == 0) & (step < W - 1))[:, None] & inside
                tl.store(dstate_ptr + state_offset + step * D, dx.to(dstate_ptr.dtype.element_ty), mask=there)
            there = ((first + (step - (W - 1)) < length) & (step >= W - 1) & (step < chunk + (W - 1)))[:, None] & inside
            tl.store(dx_walk + step * D, dx.to(dx_ptr.dtype.element_ty), mask=there)

    partial = partial_ptr + tl.program_id(0).to(tl.int64) * ((W + 1) * D) + d
    for j in tl.static_range(W + 1):
        tl.store(partial + j * D, tl.sum(sums[j], axis=0), mask=d < D)


@triton.jit(do_not_specialize=["programs"])
def sum_partials(
    dweight_ptr,  # [D, W]
    dbias_ptr,  # [D]
    partial_ptr,  # [programs, W+1, D]
    programs,
    D: tl.constexpr,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of weight and bias, summed over the programs always in the same order."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < (W + 1) * D
    acc = tl.zeros([BLOCK_P, BLOCK], tl.float32)
    for block in range(0, programs, BLOCK_P):
        program = block + tl.arange(0, BLOCK_P)
        there = (program < programs)[:, None] & inside[None, :]
        offset = program.to(tl.int64) * ((W + 1) * D)
        acc += tl.load(partial_ptr + offset[:, None] + column[None, :], mask=there, other=0.0)
    total = tl.sum(acc, axis=0)
    tap, d = column // D, column % D
    tl.store(dweight_ptr + d * W + tap, total.to(dweight_ptr.dtype.element_ty), mask=inside & (tap < W))
    if BIAS:
        tl.store(dbias_ptr + d, total.to(dbias_ptr.dtype.element_ty), mask=inside & (tap == W))
