"""The Triton kernel of a step of the online convolution (`online.py`): one token of every row, between block ends."""

import triton.language as tl

from chela.ops.launch import jit


@jit("epoch")
def step(
    x, inputs, pending, near, position, out, epoch, channels, BLOCK: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """out_t = pending_t + sum_{l = 0}^{t mod R} kernel_l x_{t-l}; x_t is also kept in `inputs`."""
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = d < channels
    b = tl.program_id(1).to(tl.int64)
    t = tl.load(position + b)
    row = b * epoch * channels
    now = tl.load(x + b * channels + d, mask=real, other=0)  # [CHANNELS]
    tl.store(inputs + row + t * channels + d, now, mask=real)
    lag = tl.arange(0, BLOCK)
    # the present is at hand: it is not read from where it is just being written
    seen = ((lag >= 1) & (lag <= t % BLOCK))[:, None] & real[None, :]  # [BLOCK, CHANNELS]
    window = tl.load(inputs + row + (t - lag)[:, None] * channels + d[None, :], mask=seen, other=0)
    taps = tl.load(near + (BLOCK - 1 - lag)[:, None] * channels + d[None, :], mask=seen, other=0)
    first = tl.load(near + (BLOCK - 1) * channels + d, mask=real, other=0)
    total = tl.load(pending + row + t * channels + d, mask=real, other=0) + first * now.to(first.dtype)
    total += tl.sum(window.to(taps.dtype) * taps, axis=0)
    tl.store(out + b * channels + d, total.to(out.dtype.element_ty), mask=real)
