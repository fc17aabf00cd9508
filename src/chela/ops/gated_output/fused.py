"""The gated output on Triton's kernels: their launch, their registration with torch, their derivative.

Bytes decide what is kept. Of the rows, the forward pass keeps the D columns that SiLU is taken of and a bit for each
that dropout keeps; u is made again from m and gate, and written for the weight's gradient.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from chela.ops import moment_kernels
from chela.ops.dropout import scale, threshold
from chela.ops.gated_output import WIDEST, kernels, weight_kernels
from chela.ops.gated_output.reference import EPS, STREAM
from chela.ops.launch import ceil, dense, grid, no_second_derivative, power, roomy, rows
from chela.ops.moments import Moments
from chela.ops.precision import no_autocast


class Tile(NamedTuple):
    """How the kernel of the weight's gradient is cut. None of it depends on the number of rows."""

    rows: int
    values: int
    """Columns of V at a time."""
    stages: int


# By the bytes of a number in the product and by the widest row they are for; not compared with others yet.
WEIGHT = {
    2: {64: Tile(64, 128, 3), 128: Tile(64, 128, 3), 256: Tile(64, 64, 3)},
    4: {64: Tile(32, 64, 2), 128: Tile(32, 64, 2), 256: Tile(32, 32, 2)},
}
# The fastest of those that were timed at 16 bits, D 128 and V 256 (docs/log.md).
VALUES = 1024
"""Entries of a tile of V's columns, 8 for each of a program's threads."""
CHANNELS = 512
"""Entries of a tile of D's."""
TILES = 16
"""Such tiles that a program walks through."""
FOLD = 1024
"""Entries of the weight that one program folds."""
SHARES = 64
"""Most parts that the rows are cut into for the weight's gradient."""
COLUMNS = 8
"""Columns of V, or twice as many of D, whose sums over all parts one program makes: 32 bytes of float32."""
SUM = 16384
"""Entries of the parts that such a program loads at a time."""


def gated_output(
    m: Tensor,
    mixed: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gain: Tensor | None,
    heads: int,
    dropout: float,
    seed: Tensor | None,
    mask: Tensor | None,
    moments: bool,
) -> tuple[Tensor, Moments | None]:
    """Run the kernels; arguments as in `chela.ops.gated_output`, already checked. Moments are computed if asked for.

    Raises:
        ValueError: float64, or rows wider than the kernels take.
    """
    if mixed.dtype == torch.float64:
        raise ValueError("gated_output's Triton kernels keep sums in float32: for float64 use impl='reference'")
    if weight.shape[0] > WIDEST:
        raise ValueError(
            f"gated_output's Triton kernels take at most D = {WIDEST} and weight has {weight.shape[0]}: "
            "use impl='reference'"
        )
    leaves = (m, mixed, residual, weight, bias, gain)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    rate = dropout if seed is not None else 0.0
    y, of_y, *_ = torch.ops.chela.gated_output.default(*leaves, mask, seed, heads, rate, moments, keep)
    return y, Moments(of_y[0], of_y[1], of_y[2, 0].detach()) if moments else None


# Registered by schema, not by torch.library.custom_op: that loads the compiler when the op is first called.
_TAG = torch.Tag.pt2_compliant_tag
_INPUTS = (
    "Tensor m, Tensor mixed, Tensor residual, Tensor weight, Tensor? bias, Tensor? gain, Tensor? mask, Tensor? seed"
)
_OPTIONS = "int heads, float dropout"
torch.library.define(
    "chela::gated_output",
    f"({_INPUTS}, {_OPTIONS}, bool moments, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAG,
)
torch.library.define(
    "chela::gated_output_backward",
    f"(Tensor dy, Tensor? dmoments, Tensor moments, Tensor pre, Tensor bits, Tensor folded, {_INPUTS},"
    f" {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAG,
)


class _Sizes:
    """Sizes that all kernels of a call share."""

    def __init__(self, m: Tensor, weight: Tensor, heads: int):
        self.d, self.v = weight.shape
        self.heads, self.n = heads, m.numel() // self.v
        self.block = max(64, power(self.d))
        self.weight = WEIGHT[m.dtype.itemsize][self.block]
        width = self.v // heads
        columns, rows = max(16, power(width)), CHANNELS // self.block
        self.by_head = {"V": self.v, "HV": width, "BV": columns, "BM": min(max(1, VALUES // columns), 64)}
        self.by_channel = {"V": self.v, "D": self.d, "BD": self.block, "BM": rows, "TILES": TILES}
        self.grid_by_head = ceil(self.n, self.by_head["BM"]), heads
        self.programs = ceil(self.n, TILES * rows)


@torch.library.impl("chela::gated_output", "default")
def _forward(
    m: Tensor,
    mixed: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    heads: int,
    dropout: float,
    moments: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    """Output, its moments [3, D] and, for the backward pass, what SiLU is taken of, its mask and the folded weight.

    Moments are mean, variance and number of positions, empty if not asked for; so are the last three without `keep`.
    """
    results = _forward_shapes(m, mixed, residual, weight, bias, gain, mask, seed, heads, dropout, moments, keep)
    out, of_out, pre, bits, folded = results
    if not m.numel():
        of_out = of_out.copy_(of_out.new_tensor([0.0, 0.0, 1.0])[:, None]) if moments else of_out
        return out, of_out, pre, bits, folded
    on = _Sizes(m, weight, heads)
    if not keep:
        pre, folded = m.new_empty(on.n, on.d), m.new_empty(weight.shape)
        bits = m.new_empty((on.n, on.block // 8) if seed is not None else 0, dtype=torch.uint8)
    u = m.new_empty(on.n, on.v)
    with torch.cuda.device_of(m), no_autocast(m.device):
        grid(weight_kernels.fold, ceil(on.d * on.v, FOLD))(
            folded, weight.contiguous(), dense(gain), D=on.d, V=on.v, NORM=gain is not None, BLOCK=FOLD
        )
        m, mixed, residual = rows(m), rows(mixed), rows(residual)
        grid(kernels.values_forward, *on.grid_by_head)(
            u, m, mixed, on.n, m.stride(0), mixed.stride(0), EPS=EPS, NORM=gain is not None, **on.by_head
        )
        torch.mm(u, folded.T, out=pre.view(on.n, on.d))
        parts = of_out.new_empty(on.programs, 3, on.d) if moments else of_out
        grid(kernels.gate_forward, on.programs)(
            out, pre, bits, parts, mixed, residual, dense(bias), dense(mask), seed,
            on.n, mixed.stride(0), residual.stride(0), threshold(dropout), scale(dropout),
            BIAS=bias is not None, DROPS=seed is not None, KEEP=keep,
            MOMENTS=moments, MASKED=mask is not None, STREAM=STREAM, **on.by_channel,
        )  # fmt: skip
        if moments:
            grid(moment_kernels.merge, ceil(on.d, COLUMNS))(
                of_out, parts, on.programs, D=on.d, BLOCK=SUM // (2 * COLUMNS), COLUMNS=COLUMNS, num_warps=8
            )
    return results if keep else (out, of_out, m.new_empty(0), bits.new_empty(0), m.new_empty(0))


@torch.library.impl("chela::gated_output_backward", "default")
def _backward(
    dy: Tensor,
    dmoments: Tensor | None,
    moments: Tensor,
    pre: Tensor,
    bits: Tensor,
    folded: Tensor,
    m: Tensor,
    mixed: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    heads: int,
    dropout: float,
) -> tuple[Tensor, ...]:
    """Gradients of m, mixed, residual, weight, bias and gain, the last two empty for None."""
    results = _backward_shapes(
        dy, dmoments, moments, pre, bits, folded, m, mixed, residual, weight, bias, gain, mask, seed, heads, dropout
    )
    dm, dmixed, dresidual, dweight, dbias, dgain = results
    if not m.numel():
        return tuple(result.zero_() for result in results)
    on = _Sizes(m, weight, heads)
    bias_partial = m.new_empty(on.programs, on.d, dtype=torch.float32)
    u = m.new_empty(on.n, on.v)
    with torch.cuda.device_of(m), no_autocast(m.device):
        dy, m, mixed, residual = rows(dy), rows(m), rows(mixed), rows(residual)
        grid(kernels.gate_backward, on.programs)(
            dmixed, dresidual, bias_partial, dy, dense(dmoments), moments.contiguous(), pre.contiguous(),
            bits, mixed, residual, dense(mask), on.n, dy.stride(0), mixed.stride(0), residual.stride(0), scale(dropout),
            DROPS=seed is not None, MOMENTS=dmoments is not None, MASKED=mask is not None, **on.by_channel,
        )  # fmt: skip
        dpre = rows(dmixed)[:, on.v : on.v + on.d]
        du = torch.mm(dpre, folded)
        grid(kernels.values_backward, *on.grid_by_head)(
            dm, dmixed, u, du, m, mixed, on.n, m.stride(0), mixed.stride(0),
            D=on.d, EPS=EPS, NORM=gain is not None, **on.by_head,
        )  # fmt: skip
        tile = on.weight
        share = ceil(ceil(on.n, SHARES), tile.rows) * tile.rows
        shares = ceil(on.n, share)
        columns = min(tile.values, max(16, power(on.v)))
        partial = m.new_empty(shares, on.d, on.v, dtype=torch.float32)
        grid(weight_kernels.multiply, shares, ceil(on.v, columns))(
            partial, dpre, u, on.n, share, dpre.stride(0),
            D=on.d, V=on.v, BM=tile.rows, BD=on.block, BV=columns,
            STAGES=tile.stages if roomy(m.device) else min(tile.stages, 2), num_warps=8,
        )  # fmt: skip
        grid(weight_kernels.finish, ceil(on.v, COLUMNS) + ceil(on.d, 2 * COLUMNS))(
            dweight, dgain, dbias, partial, bias_partial, weight.contiguous(), dense(gain), shares, on.programs,
            D=on.d, V=on.v, NORM=gain is not None, BIAS=bias is not None, BD=on.block, BV=COLUMNS,
            SHARES=SUM // (on.block * COLUMNS), BLOCK=SUM // (2 * COLUMNS), COLUMNS=2 * COLUMNS, num_warps=8,
        )  # fmt: skip
    return results


@torch.library.register_fake("chela::gated_output")
def _forward_shapes(
    m: Tensor,
    mixed: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    heads: int,
    dropout: float,
    moments: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    of_out = m.new_empty((3, weight.shape[0]) if moments else (0,), dtype=torch.float32)
    pre, folded = (m.new_empty(like.shape if keep else (0,)) for like in (residual, weight))
    channels = max(64, power(weight.shape[0]))
    width = channels // 8 if keep and seed is not None else 0
    bits = m.new_empty((*m.shape[:-1], width) if width else (0,), dtype=torch.uint8)
    return residual.new_empty(residual.shape), of_out, pre, bits, folded


@torch.library.register_fake("chela::gated_output_backward")
def _backward_shapes(
    dy: Tensor,
    dmoments: Tensor | None,
    moments: Tensor,
    pre: Tensor,
    bits: Tensor,
    folded: Tensor,
    m: Tensor,
    mixed: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    heads: int,
    dropout: float,
) -> tuple[Tensor, ...]:
    inputs = m, mixed, residual, weight, bias, gain
    return tuple(m.new_empty(0) if like is None else like.new_empty(like.shape) for like in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.heads, ctx.dropout, ctx.moments, _ = inputs
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dy: Tensor | None, dmoments: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    *kept, m, mixed, residual, weight, bias, gain, mask, seed = ctx.saved_tensors
    leaves = m, mixed, residual, weight, bias, gain
    dmoments = dmoments if ctx.moments else None
    if dy is None and dmoments is None:
        return (None,) * (len(leaves) + 6)
    dy = torch.zeros_like(residual) if dy is None else dy
    gradients = torch.ops.chela.gated_output_backward.default(
        dy, dmoments, *kept, *leaves, mask, seed, ctx.heads, ctx.dropout
    )
    given = (None if like is None else gradient for like, gradient in zip(leaves, gradients, strict=True))
    return *given, None, None, None, None, None, None


torch.library.register_autograd("chela::gated_output", _differentiate, setup_context=_save)
torch.library.register_autograd("chela::gated_output_backward", no_second_derivative("gated_output"))
