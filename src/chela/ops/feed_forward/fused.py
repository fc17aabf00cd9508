"""The feed-forward part on Triton's kernels: their launch, their registration with torch, their derivative."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chela.ops.dropout import scale, threshold
from chela.ops.feed_forward import kernels, kernels_backward, widest
from chela.ops.feed_forward.reference import EPS
from chela.ops.launch import ceil, dense, grid, no_second_derivative, power, roomy


class Tile(NamedTuple):
    """How a kernel is cut. None of it depends on the number of rows."""

    rows: int
    hidden: int
    """Columns of F at a time; a multiple of 64, as dropout wants."""
    warps: int
    stages: int
    """Slices of the weights, or tiles of rows for the weights' gradients, that are on their way at a time.

    With dropout it is always one: what makes the masks takes the registers."""


class Plan(NamedTuple):
    """Tiles of the three kernels."""

    forward: Tile
    row_gradients: Tile
    weight_gradients: Tile


# By the bytes of a number in the products and by the widest row they are for. Shared memory holds a tile of rows and
# `stages` slices of both weights; registers a float32 tile of rows, its hidden columns and, in the last, two matrices.
PLANS = {
    2: {
        64: Plan(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
        128: Plan(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
        256: Plan(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 64, 8, 1)),
    },
    4: {
        64: Plan(Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(64, 64, 8, 1)),
        128: Plan(Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(64, 64, 8, 1)),
    },
}
# With a third matrix a slice of the weights is half as large again, and so are the gradients that registers hold: with
# half as many rows at a time those spill nothing where whole tiles spilled 1.2 KB a thread.
GATED_PLANS = {
    2: {
        64: Plan(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 64, 8, 2)),
        128: Plan(Tile(64, 64, 4, 2), Tile(64, 64, 4, 1), Tile(32, 64, 8, 2)),
        256: Plan(Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(32, 64, 8, 1)),
    },
    4: {
        64: Plan(Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(64, 64, 8, 1)),
        128: Plan(Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(32, 64, 8, 1)),
    },
}
# For GPUs with less shared memory than an H100; float32 products with a third matrix have no room there.
TIGHT_PLANS = {
    2: {64: PLANS[2][64], 128: Plan(Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(64, 64, 8, 1))},
    4: {64: PLANS[4][64]},
}
FOLD = 16
"""Rows of the weights that one program folds."""
SUM = 4096
"""Numbers of each kind that are loaded at a time when the splits' shares of the weights' gradients are summed."""


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    w3: Tensor | None,
    bounded: bool,
    norm: str,
    gain: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    residual: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Run the kernels; arguments as in `chela.ops.feed_forward`, already checked, `residual` None for x.

    Raises:
        ValueError: float64, or rows wider than the kernels take.
    """
    if x.dtype == torch.float64 or (residual is not None and residual.dtype == torch.float64):
        raise ValueError("feed_forward's Triton kernels keep sums in float32: for float64 use impl='reference'")
    most = widest(dtype, x.device, gated=w3 is not None)
    if x.shape[-1] > most:
        raise ValueError(
            f"feed_forward's Triton kernels take at most D = {most} with products of {dtype} on this device, and x has "
            f"{x.shape[-1]}: use impl='reference'"
        )
    rate = dropout if seed is not None else 0.0
    given = _Given(w1, b1, w2, b2, w3, gain, shift, mean, rstd, seed, norm, bounded, rate, dtype)
    return torch.ops.chela.feed_forward.default(x, residual, *given)


class _Given(NamedTuple):
    """What both ops are given besides rows: parameters, statistics, seed and options."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor | None
    gain: Tensor | None
    shift: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    seed: Tensor | None
    norm: str
    bounded: bool
    dropout: float
    dtype: torch.dtype

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """What has a gradient."""
        return self[:9]


# Registered by schema, not by torch.library.custom_op: that loads the compiler when the op is first called.
_TAG = torch.Tag.pt2_compliant_tag
_GIVEN = (
    "Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor? w3, Tensor? gain, Tensor? shift, Tensor? mean, Tensor? rstd, "
    "Tensor? seed, str norm, bool bounded, float dropout, ScalarType dtype"
)
torch.library.define("chela::feed_forward", f"(Tensor x, Tensor? residual, {_GIVEN}) -> Tensor", tags=_TAG)
torch.library.define(
    "chela::feed_forward_backward",
    f"(Tensor dy, Tensor x, bool own, {_GIVEN}) -> ({', '.join(['Tensor'] * 10)})",
    tags=_TAG,
)


class _Launch:
    """What all kernels of a call share: weights folded, sizes, dropout's numbers."""

    def __init__(self, x: Tensor, given: _Given):
        w1, b1, w2, w3, dtype = given.w1, given.b1, given.w2, given.w3, given.dtype
        self.f, self.d = w1.shape
        self.rows = x.numel() // self.d
        self.block = max(64, power(self.d))
        self.gated = {"GATED": w3 is not None}
        self.bounded = {"BOUNDED": given.bounded}
        plans = TIGHT_PLANS if not roomy(x.device) else PLANS if w3 is None else GATED_PLANS
        self.plan = plans[dtype.itemsize][self.block]
        self.padded = ceil(self.f, 64) * 64
        self.drops = (given.seed, threshold(given.dropout), scale(given.dropout))
        # The gain's one number for all channels is read D times.
        gain, shift, norm = given.gain, given.shift, given.norm
        self.gains = {"GAIN": gain is not None, "GAIN_STEP": int(norm != "scale"), "SHIFT": shift is not None}
        self.norm = {"NORM": "rms" if norm == "scale" else norm, "EPS": EPS[norm]}
        self.drop = {"DROP": given.seed is not None}
        self.programs = _programs(x.device)
        weights = x.new_empty(2 if w3 is None else 3, self.padded, self.block, dtype=dtype)
        biases = x.new_empty(2, self.padded, dtype=torch.float32)
        grid(kernels.fold, self.padded // FOLD)(
            weights[0], weights[1], weights[-1], *biases,
            w1.contiguous(), b1.contiguous(), w2.contiguous(), dense(w3), dense(gain), dense(shift),
            F=self.f, D=self.d, BLOCK_F=FOLD, BLOCK_D=self.block, **self.gains, **self.gated,
        )  # fmt: skip
        self.weights = weights[0], biases[0], weights[1], weights[-1], biases[1]

    def tiles(self, tile: Tile) -> int:
        """Tiles that hold all rows."""
        return ceil(self.rows, tile.rows)

    def sizes(self, tile: Tile) -> dict[str, Any]:
        """Constants of a kernel."""
        return {
            "D": self.d,
            "F": self.padded,
            "BLOCK_M": tile.rows,
            "BLOCK_D": self.block,
            "BLOCK_F": tile.hidden,
            "STAGES": 1 if self.drop["DROP"] else tile.stages,
            "num_warps": tile.warps,
            **self.gated,
            **self.bounded,
            **self.drop,
        }


@torch.library.impl("chela::feed_forward", "default")
def _forward(x: Tensor, residual: Tensor | None, *arguments: Any) -> Tensor:
    given = _Given(*arguments)
    out = _forward_shape(x, residual, *arguments)
    if not out.numel():
        return out
    with torch.cuda.device_of(x):
        on = _Launch(x, given)
        tile = on.plan.forward
        x = x.contiguous()
        grid(kernels.feed_forward, on.tiles(tile))(
            out, x, x if residual is None else residual.contiguous(), *on.weights, given.b2.contiguous(),
            dense(given.mean), dense(given.rstd), on.drops[0], on.rows, *on.drops[1:], **on.norm, **on.sizes(tile),
        )  # fmt: skip
    return out


@torch.library.impl("chela::feed_forward_backward", "default")
def _backward(dy: Tensor, x: Tensor, own: bool, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of x (with the residual's if x is it) and of all parameters, empty for None."""
    given = _Given(*arguments)
    norm, dtype = given.norm, given.dtype
    results = _backward_shapes(dy, x, own, *arguments)
    dx, dw1, db1, dw2, db2, dw3, dgain, dshift, dmean, drstd = results
    if not x.numel():
        return tuple(result.zero_() for result in results)
    with torch.cuda.device_of(x):
        on = _Launch(x, given)
        x, dy = x.contiguous(), dy.contiguous()
        writes = norm != "none" or x.dtype != dtype, given.seed is not None or dy.dtype != dtype
        xh, dz = (
            torch.empty_like(like, dtype=dtype) if write else like for like, write in zip((x, dy), writes, strict=True)
        )
        tile = on.plan.row_gradients
        bits = x.new_empty(on.rows if given.seed is not None else 0, on.block // 8, dtype=torch.uint8)
        grid(kernels_backward.row_gradients, on.tiles(tile))(
            dx, xh, dz, bits, dy, x, *on.weights, dense(given.mean), dense(given.rstd),
            on.drops[0], on.rows, *on.drops[1:],
            OWN=own, WRITE_XH=writes[0], WRITE_DZ=writes[1], **on.norm, **on.sizes(tile),
        )  # fmt: skip
        tile = on.plan.weight_gradients
        slices = on.padded // tile.hidden
        splits = min(on.tiles(tile), max(on.programs // slices, 1))
        hidden = 1 if given.w3 is None else 2  # products behind the norm
        size = ((hidden + 1) * on.padded + 1) * on.block + hidden * on.padded
        parts = x.new_empty(splits, size, dtype=torch.float32)
        grid(kernels_backward.weight_gradients, slices, splits)(
            parts, xh, dz, *on.weights, on.drops[0], on.rows, splits, *on.drops[1:], **on.sizes(tile)
        )
        # One gain for all channels has the sum of theirs as its gradient.
        gains = dgain.new_empty(on.d, dtype=torch.float32) if norm == "scale" else dgain
        grid(kernels_backward.sum_parts, on.d)(
            dw1, db1, dw2, db2, dw3, gains, dshift, dmean, drstd, parts,
            given.w1.contiguous(), dense(given.w3), dense(given.gain), dense(given.shift), dense(given.rstd), splits,
            D=on.d, F=on.f, PADDED=on.padded, BATCH=norm == "batch", BLOCK_D=on.block,
            BLOCK_F=power(on.f), BLOCK_S=max(SUM // power(on.f), 1), **on.gains, **on.gated,
        )  # fmt: skip
        if norm == "scale":
            torch.sum(gains, 0, keepdim=True, dtype=dgain.dtype, out=dgain)
    return results


@torch.library.register_fake("chela::feed_forward")
def _forward_shape(x: Tensor, residual: Tensor | None, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=x.dtype if residual is None else residual.dtype)


@torch.library.register_fake("chela::feed_forward_backward")
def _backward_shapes(dy: Tensor, x: Tensor, own: bool, *arguments: Any) -> tuple[Tensor, ...]:
    inputs = x, *_Given(*arguments).differentiable
    return tuple(x.new_empty(0) if like is None else like.new_empty(like.shape) for like in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, residual, *arguments = inputs
    given = _Given(*arguments)
    ctx.own = residual is None
    ctx.options = given.norm, given.bounded, given.dropout, given.dtype
    ctx.save_for_backward(x, *given.differentiable, given.seed)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, *tensors = ctx.saved_tensors
    given = _Given(*tensors, *ctx.options)
    dx, *gradients = torch.ops.chela.feed_forward_backward.default(dy, x, ctx.own, *given)
    wanted = (
        None if like is None else gradient for like, gradient in zip(given.differentiable, gradients, strict=True)
    )
    return dx, None if ctx.own else dy, *wanted, None, None, None, None, None


torch.library.register_autograd("chela::feed_forward", _differentiate, setup_context=_save)
torch.library.register_autograd("chela::feed_forward_backward", no_second_derivative("feed_forward"))


@functools.cache
def _programs(device: torch.device) -> int:
    """Programs that run side by side; two where the kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
