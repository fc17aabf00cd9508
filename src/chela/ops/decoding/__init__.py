"""One token of a block in few launches: what `models.fused_step` puts between matrix products on a GPU.

At one token a row, launches cost more than the numbers they read. Each function here is one launch for a chain that the
layers write as many operations; their forward is the reference. No gradients, no float64, and states are
changed in place, at addresses that stay: a CUDA graph can hold all of it.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from chela.ops.launch import ceil, power
from chela.ops.long_conv.online import OnlineState

Activation = Literal["none", "silu", "swiglu", "bounded-swiglu"]
"""What follows a product."""
CHANNELS = 32
"""Channels of a program of the convolutions."""
COLUMNS = 1024
"""Columns of a program of SwiGLU."""
FEW_ROWS = 4
"""Rows up to which a product's own kernel stands in for cuBLAS: it is then a reading of the weights."""
TILE = 8192
"""Weights times rows that a program of it holds."""
LARGEST_HEAD = 2**15
"""Numbers of a head's K x V that a program takes."""
HEAD_PART = 2**13
"""Those that it holds at once: 32 a thread, beside which registers are left."""
PLACES = 64
"""Cached keys that a program takes at once."""
PROGRAMS = 1056
"""Programs that keep a large GPU's memory busy: eight on each of 132 processors."""
MOST_SHARES = 128
"""Programs that share the cached keys of a head."""


class Norm(NamedTuple):
    """A norm over D, see `chela.ops.feed_forward`; "none" leaves it out."""

    kind: Literal["layer", "rms", "scale", "none"]
    gain: Float[Tensor, " d_or_1"] | None = None
    shift: Float[Tensor, " d"] | None = None

    @property
    def lowest(self) -> float:
        """What is added to the mean square."""
        return 1e-5 if self.kind == "layer" else 1e-6


class Convolutions(NamedTuple):
    """Weights of both stages; the long one's taps are in its state."""

    weight: Float[Tensor, "d w"]
    """Of the short stage."""
    bias: Float[Tensor, " d"]
    """Of the short stage."""
    long_bias: Float[Tensor, " d"] | None
    """Of the long stage."""


class Heads(NamedTuple):
    """Parameters of the attention beside its products, float32."""

    q_gain: Float[Tensor, "h k"]
    q_bias: Float[Tensor, "h k"]
    k_gain: Float[Tensor, "h k"]
    k_bias: Float[Tensor, "h k"]
    decay: Float[Tensor, " h"] | None
    norm_gain: Float[Tensor, " hv"] | None
    """None without output norm."""
    scale: float


def add_norm(
    x: Float[Tensor, "b d"], more: Float[Tensor, "b d"], norm: Norm, dtype: torch.dtype
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
    """`x + more` in float32, and its norm in `dtype`."""
    from chela.ops.decoding import kernels

    (rows, d), total = x.shape, torch.empty_like(x)
    y = x.new_empty(rows, d, dtype=dtype)
    kernels.add_norm[(rows,)](
        x, more, norm.gain, norm.shift, total, y,
        D=d, ROW=power(d), NORM=norm.kind, LOWEST=norm.lowest, num_warps=4,
    )  # fmt: skip
    return total, y


def convolve(
    x: Float[Tensor, "b d"],
    more: Float[Tensor, "b d"] | None,
    norm: Norm,
    weights: Convolutions,
    short: Float[Tensor, "b w_minus_1 d"],
    long: OnlineState,
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"], Float[Tensor, "b d"]]:
    """Both stages of the short-long convolution on `norm(x + more)`.

    `short` and the inputs of `long` take the token; its position is to be raised, then `advance` called, by the caller.

    Returns:
        x + more in float32; its norm; the convolved sequence, both in the dtype of `short`.
    """
    from chela.ops.decoding import kernels

    rows, d = x.shape
    total = x if more is None else torch.empty_like(x)
    y, z = (x.new_empty(rows, d, dtype=long.inputs.dtype) for _ in range(2))
    past = weights.weight.shape[1] - 1
    kernels.convolve[(ceil(d, CHANNELS), rows)](
        x, more, norm.gain, norm.shift, short, weights.weight, weights.bias,
        long.inputs, long.pending, long.near, long.position, weights.long_bias, total, y, z, long.epoch,
        D=d, ROW=power(d), NORM=norm.kind, LOWEST=norm.lowest, PAST=past, TAPS=power(past), BLOCK=long.block,
        CHANNELS=CHANNELS, MORE=more is not None, BIASED=weights.long_bias is not None, num_warps=4,
    )  # fmt: skip
    return total, y, z


def attend(
    mixed: Float[Tensor, "b n"], values: Float[Tensor, "b v"], heads: Heads, state: Float[Tensor, "b h k v"]
) -> Float[Tensor, "b v"]:
    """One token of gated linear attention without its last product; `state` takes the token.

    Args:
        mixed: `z` times the weights of the basis (first K columns), the gate (V) and whatever else.
        values: `x W_v`, before its SiLU.
        heads: parameters.
        state: float32, without gaps.
    """
    from chela.ops.decoding import kernels

    (rows, count, key, value), out = state.shape, torch.empty_like(values)
    columns = max(16, power(value))
    keys = min(max(16, power(key)), max(1, HEAD_PART // columns))
    kernels.attend[(count, rows)](
        mixed, values, *heads[:6], state, out, heads.scale, mixed.shape[1],
        HEADS=count, K=key, V=value, KEYS=keys, VALUES=columns,
        DECAYS=heads.decay is not None, NORMED=heads.norm_gain is not None,
        num_warps=8,
    )  # fmt: skip
    return out


def gate(
    mixed: Float[Tensor, "b n"], out: Float[Tensor, "b d"], x: Float[Tensor, "b d"], norm: Norm
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
    """`x + sigmoid(p) (silu(h + out) - x)` in float32, and its norm; h and p are the last 2 D columns of `mixed`."""
    from chela.ops.decoding import kernels

    (rows, d), width = x.shape, mixed.shape[1]
    total, y = torch.empty_like(x), torch.empty_like(out)
    kernels.gate[(rows,)](
        mixed, out, x, norm.gain, norm.shift, total, y, width, width - 2 * d,
        D=d, ROW=power(d), NORM=norm.kind, LOWEST=norm.lowest, num_warps=4,
    )  # fmt: skip
    return total, y


def product(
    x: Float[Tensor, "b k"],
    weight: Float[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None,
    activation: Activation = "none",
) -> Float[Tensor, "b n_or_half_n"]:
    """`activation(x W^T + b)`; "swiglu" is `silu(gate) * up` of the two halves, "bounded-swiglu" with tanh(up).

    For more than FEW_ROWS by cuBLAS.
    """
    from chela.ops.decoding import kernels

    (rows, width), outputs = x.shape, weight.shape[0] // (2 if activation.endswith("swiglu") else 1)
    if rows > FEW_ROWS:
        y = F.linear(x, weight, bias)
        if activation == "none":
            return y
        if activation == "silu":
            return F.silu(y, inplace=True)
        out = x.new_empty(rows, outputs)
        kernels.swiglu[(ceil(outputs, COLUMNS), rows)](
            y, out, outputs, COLUMNS=COLUMNS, BOUNDED=activation == "bounded-swiglu", num_warps=4
        )
        return out
    out, few = x.new_empty(rows, outputs), power(rows)
    n = min(16, max(2, power(outputs) // 128))  # about a program a processor
    kernels.product[(ceil(outputs, n),)](
        x, weight, bias, out, rows, outputs,
        WIDTH=width, ROWS=few, BLOCK_N=n, BLOCK_K=min(power(width), max(64, TILE // (few * n))),
        ACTIVATION="swiglu" if activation.endswith("swiglu") else activation,
        BOUNDED=activation == "bounded-swiglu", BIASED=bias is not None, num_warps=4,
    )  # fmt: skip
    return out


def cached_attention(
    qkv: Float[Tensor, "b 3hk"],
    rates: Float[Tensor, " half_k"],
    position: Int[Tensor, " 1"],
    keys: Float[Tensor, "b c h k"],
    values: Float[Tensor, "b c h k"],
    begins: Int[Tensor, " b"] | None,
) -> Float[Tensor, "b hk"]:
    """One token of rotary softmax attention; keys and values take the token, at `position` for all rows.

    Args:
        qkv: queries, keys and values, before the rotation.
        rates: of the rotations, float32.
        position: the first free place.
        keys: rotated keys in a room of C places, without gaps.
        values: values likewise.
        begins: the first place of each row that is not padding.
    """
    from chela.ops.decoding import cached_kernels

    rows, room, heads, k = keys.shape
    shares = min(MOST_SHARES, power(ceil(room, PLACES)), power(max(1, PROGRAMS // (rows * heads))))
    q = qkv.new_empty(rows, heads * k)
    sums, tops, weights = (torch.empty(rows, heads, shares, n, dtype=torch.float32, device=q.device) for n in (k, 1, 1))
    width = max(16, power(k))
    cached_kernels.place[(heads, rows)](
        qkv, rates, position, q, keys, values, room, HEADS=heads, K=k, HALF=k // 2, HALVES=power(k // 2), num_warps=1
    )
    cached_kernels.partial[(shares, heads, rows)](
        q, keys, values, begins, position, sums, tops, weights, k**-0.5 * math.log2(math.e), room,
        HEADS=heads, K=k, KEYS=width, SHARES=shares, BLOCK=PLACES, BEGINS=begins is not None, num_warps=4,
    )  # fmt: skip
    out = torch.empty_like(q)
    cached_kernels.combine[(rows * heads,)](sums, tops, weights, out, K=k, KEYS=width, SHARES=shares, num_warps=4)
    return out
