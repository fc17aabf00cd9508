"""Short depthwise convolution on Triton's kernels: their launch, their registration with torch, their derivative."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chela.ops.launch import ceil, no_second_derivative, power
from chela.ops.short_conv import kernels

MOST_TAPS = 32
"""A thread keeps the last W-1 rows in registers."""


class Tile(NamedTuple):
    """How a program is cut. All of it is known to the compiler, none of it depends on the length or the batch."""

    elements: int
    """Entries of a row of the tile that a thread owns, neighbouring channels if D allows: 8 of 2 bytes load at once."""
    warps: int
    unroll: int
    """Rows taken in one turn of the loop, all loaded before the first is used."""
    stages: int = 1
    """With more than 1 the compiler fetches turns ahead through shared memory."""
    programs: int = 512
    """Programs worth having before the stretches of time grow longer: a few for each processor of a large GPU."""


# By the largest width they are for: the registers of a thread hold its channels W times forward, 4 W times backward.
FORWARD = {4: Tile(8, 4, 8, programs=1024), 8: Tile(4, 4, 4), 16: Tile(2, 4, 4), 32: Tile(1, 4, 4)}
BACKWARD = {4: Tile(4, 4, 4, stages=3), 8: Tile(2, 4, 4), 16: Tile(1, 4, 4), 32: Tile(1, 4, 2)}
CHANNELS = 128
"""Most channels of a tile."""
SUM = (64, 16)
"""Programs and columns of a tile of the weight's gradient, when it is summed over the programs."""
SHORTEST, LONGEST = 2, 16
"""Bounds of a stretch, in multiples of the width: W-1 rows next to a stretch are read once more."""


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    causal: bool,
    activation: str | None,
    state: Tensor | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Run the convolution; arguments as in `chela.ops.short_conv`, already checked.

    Raises:
        ValueError: float64, or more taps than the kernels take.
    """
    if x.dtype == torch.float64:
        raise ValueError("short_conv's Triton kernels keep sums in float32 and x is float64: use impl='reference'")
    if weight.shape[1] > MOST_TAPS:
        raise ValueError(
            f"short_conv's Triton kernels take at most {MOST_TAPS} taps and weight has {weight.shape[1]}: "
            "use impl='reference', or long_conv"
        )
    silu = activation == "silu"
    out, after = torch.ops.chela.short_conv.default(x, weight, bias, state, cu_seqlens, causal, silu, return_state)
    return out, after if return_state else None


def short_conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, state: Tensor, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Take one token, in one launch; arguments as in `chela.ops.short_conv_step`, already checked.

    Raises:
        ValueError: as in `short_conv`.
    """
    out, after = short_conv(
        x.unsqueeze(1),
        weight,
        bias,
        causal=True,
        activation=activation,
        state=state,
        return_state=True,
        cu_seqlens=None,
    )
    assert after is not None
    return out.squeeze(1), after


# Registered by schema, not by torch.library.custom_op: that loads the compiler when the op is first called.
_TAG = torch.Tag.pt2_compliant_tag
_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? cu_seqlens, bool causal, bool silu"
torch.library.define("chela::short_conv", f"({_INPUTS}, bool return_state) -> (Tensor, Tensor)", tags=_TAG)
torch.library.define(
    "chela::short_conv_backward",
    f"(Tensor dy, Tensor? dstate_out, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAG,
)


@torch.library.impl("chela::short_conv", "default")
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    silu: bool,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, D] and the state after it [N, W-1, D], or an empty tensor."""
    out, after = _forward_shapes(x, weight, bias, state, cu_seqlens, causal, silu, return_state)
    width = weight.shape[1]
    cut = _Cut(x, width, cu_seqlens, _of(FORWARD, width))
    rows = _Rows(x)
    state_out = return_state and width > 1
    state = state if width > 1 else None
    if out.numel() or after.numel():
        with torch.cuda.device_of(x):
            launch: Any = kernels.short_conv_forward[cut.grid]
            launch(
                out,
                after if state_out else None,
                rows.tensor,
                weight.contiguous(),
                bias,
                None if state is None else state.contiguous(),
                cu_seqlens,
                *cut.sizes,
                *rows.strides,
                W=width,
                RIGHT=0 if causal else width // 2,
                ALIGN=rows.align,
                SILU=silu,
                BIAS=bias is not None,
                STATE=state is not None,
                STATE_OUT=state_out,
                **cut.options,
            )
    return out, after


@torch.library.impl("chela::short_conv_backward", "default")
def _backward(
    dy: Tensor,
    dstate_out: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x, weight, bias and state, the last two empty where those are None."""
    results = _backward_shapes(dy, dstate_out, x, weight, bias, state, cu_seqlens, causal, silu)
    dx, dweight, dbias, dstate = results
    width, channels = weight.shape[1], x.shape[2]
    cut = _Cut(x, width, cu_seqlens, _of(BACKWARD, width))
    rows, drows = _Rows(x), _Rows(dy)
    state = state if width > 1 else None
    dstate_out = dstate_out if width > 1 else None
    if not cut.sequences or not channels:
        return dx, dweight.zero_(), dbias.zero_(), dstate
    partial = x.new_empty(cut.grid[0], width + 1, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        launch: Any = kernels.short_conv_backward[cut.grid]
        launch(
            dx,
            partial,
            None if state is None else dstate,
            drows.tensor,
            None if dstate_out is None else dstate_out.contiguous(),
            rows.tensor,
            weight.contiguous(),
            bias,
            None if state is None else state.contiguous(),
            cu_seqlens,
            *cut.sizes,
            *rows.strides,
            *drows.strides,
            W=width,
            RIGHT=0 if causal else width // 2,
            ALIGN=rows.align,
            ALIGN_DY=drows.align,
            SILU=silu,
            BIAS=bias is not None,
            STATE=state is not None,
            DSTATE_OUT=dstate_out is not None,
            **cut.options,
        )
        total: Any = kernels.sum_partials[(ceil((width + 1) * channels, SUM[1]),)]
        total(
            dweight,
            dbias,
            partial,
            len(partial),
            D=channels,
            W=width,
            BIAS=bias is not None,
            BLOCK_P=SUM[0],
            BLOCK=SUM[1],
        )
    return results


@torch.library.register_fake("chela::short_conv")
def _forward_shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    silu: bool,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (rows, weight.shape[1] - 1, x.shape[2]) if return_state else (0,)
    return x.new_empty(x.shape), x.new_empty(shape)


@torch.library.register_fake("chela::short_conv_backward")
def _backward_shapes(
    dy: Tensor,
    dstate_out: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    dstate = x.new_empty(0) if state is None else state.new_empty(state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dstate


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.silu, ctx.return_state = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dstate_out: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight, dbias, dstate = torch.ops.chela.short_conv_backward.default(
        dy, dstate_out if ctx.return_state else None, x, weight, bias, state, cu_seqlens, ctx.causal, ctx.silu
    )
    dbias = None if bias is None else dbias
    dstate = None if state is None else dstate
    return dx, dweight, dbias, dstate, None, None, None, None


torch.library.register_autograd("chela::short_conv", _differentiate, setup_context=_save)
torch.library.register_autograd("chela::short_conv_backward", no_second_derivative("short_conv"))


class _Rows:
    """A tensor [B, T, D] as the kernels read it: unit stride along D, the other strides in units of `align`.

    Only a tensor whose last axis has another stride is copied.
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor if tensor.stride(2) == 1 or tensor.shape[2] == 1 else tensor.contiguous()
        batch, row = self.tensor.stride()[:2]
        if self.tensor.shape[0] == 1:
            batch = 0  # never used: any number would do
        self.align = math.gcd(batch, row, 16)
        self.strides = batch // self.align, row // self.align


class _Cut:
    """How the work on x [B, T, D] is cut into programs: the grid and the kernels' sizes."""

    def __init__(self, x: Tensor, width: int, cu_seqlens: Tensor | None, tile: Tile):
        batch, length, channels = x.shape
        self.sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        block = min(power(channels), CHANNELS)
        segments = max(32 * tile.warps * tile.elements // block, 1)
        tiles = ceil(channels, block)
        unit = max(power(width), 4)
        fit = power(ceil(batch * length * tiles, segments * tile.programs))
        chunk = min(max(fit, SHORTEST * unit), LONGEST * unit, max(power(length), tile.unroll))
        stretches = max(ceil(length, chunk), 1)
        total = batch * stretches if cu_seqlens is None else length // chunk + self.sequences
        self.grid = (ceil(total, segments), tiles)
        self.sizes = (self.sequences, length, stretches, chunk, self.sequences.bit_length())
        self.options = {
            "D": channels,
            "PACKED": cu_seqlens is not None,
            "SEG": segments,
            "BLOCK_D": block,
            "UNROLL": tile.unroll,
            "STAGES": tile.stages,
            "num_warps": tile.warps,
        }


def _of(table: dict[int, Tile], width: int) -> Tile:
    return next(tile for widest, tile in table.items() if width <= widest)
