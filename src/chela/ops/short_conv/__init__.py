"""Short depthwise convolution: a few taps a channel, with an optional SiLU."""

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from chela.ops.checks import check_alike, check_causal_only, check_documents, check_shape
from chela.ops.impl import Impl, resolve
from chela.ops.precision import no_autocast
from chela.ops.short_conv import reference

Activation = Literal["silu"]


def short_conv(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"] | None = None,
    *,
    causal: bool = True,
    activation: Activation | None = None,
    state: Float[Tensor, "n w_minus_1 d"] | None = None,
    return_state: bool = False,
    cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "n w_minus_1 d"] | None]:
    """Convolve each channel with its own W taps: `out_t = act(bias + sum_j weight[:, j] x_{t + j - left})`.

    Causal: left = W-1, so the last tap meets the current step (causal-conv1d's order). Otherwise left = (W-1) // 2:
    centred, and for even W the future has one tap more than the past (as torch's padding="same"). Beyond the ends x
    is zero. Sums are kept in float32 (float64 for float64).

    Args:
        x: input [B, T, D].
        weight: taps [D, W], W >= 1; any floating dtype no wider than the sums'.
        bias: [D], likewise, or None.
        causal: past and present only.
        activation: None or "silu".
        state: the W-1 inputs before x [B, W-1, D] in x's dtype, zeros where there were fewer; packed: [N, W-1, D].
        return_state: also return the last W-1 inputs, those of `state` included when T < W-1.
        cu_seqlens: int32 [N+1], ends of N documents packed along T with B = 1: starts at 0, never decreases, may
            repeat (empty documents), ends at T. A document's numbers never depend on its neighbours.
        impl: "auto" (Triton on CUDA, the reference elsewhere), "triton" (W up to 32; no float64, no second
            derivative) or "reference".

    Returns:
        Output [B, T, D] in x's dtype, and the state [B, W-1, D] (packed: [N, W-1, D]), or None.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; state or cu_seqlens without `causal=True`; the
            implementation cannot run here. The contents of cu_seqlens are checked on the CPU only.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, D]; got {list(x.shape)}")
    _check(x, weight, bias, activation)
    check_causal_only(causal, state, return_state, cu_seqlens)
    if cu_seqlens is not None:
        check_documents(cu_seqlens, x)
    if state is not None:
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _check_state(state, rows, x, weight, "[B, W-1, D]" if cu_seqlens is None else "[N, W-1, D]")
    options = {
        "causal": causal,
        "activation": activation,
        "state": state,
        "return_state": return_state,
        "cu_seqlens": cu_seqlens,
    }
    if resolve(impl, x.device, "short_conv") == "triton":
        from chela.ops.short_conv import fused

        return fused.short_conv(x, weight, bias, **options)
    with no_autocast(x.device):
        return reference.short_conv(x, weight, bias, **options)


def short_conv_step(
    x: Float[Tensor, "b d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, " d"] | None = None,
    *,
    state: Float[Tensor, "b w_minus_1 d"],
    activation: Activation | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b w_minus_1 d"]]:
    """Take one token of the causal convolution. The state passed in is left as it was.

    Args:
        x: input [B, D].
        weight: taps [D, W], the last meets x.
        bias: [D] or None.
        state: the W-1 inputs before x [B, W-1, D]; zeros before the first token.
        activation: None or "silu".
        impl: as in `short_conv`.

    Returns:
        Output [B, D] in x's dtype and the new state [B, W-1, D].

    Raises:
        ValueError: as in `short_conv`.
    """
    if x.dim() != 2:
        raise ValueError(f"x must be [B, D]; got {list(x.shape)}")
    _check(x, weight, bias, activation)
    _check_state(state, x.shape[0], x, weight, "[B, W-1, D]")
    if resolve(impl, x.device, "short_conv") == "triton":
        from chela.ops.short_conv import fused

        return fused.short_conv_step(x, weight, bias, state=state, activation=activation)
    with no_autocast(x.device):
        return reference.short_conv_step(x, weight, bias, state=state, activation=activation)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    channels = x.shape[-1]
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight must be [D, W] with D = {channels}, W >= 1; got {list(weight.shape)}")
    if bias is not None:
        check_shape("bias", bias, (channels,), "[D]")
    check_alike({"x": x}, {"weight": weight, "bias": bias})
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu'; got {activation!r}")


def _check_state(state: Tensor, rows: int, x: Tensor, weight: Tensor, legend: str) -> None:
    check_shape("state", state, (rows, weight.shape[1] - 1, x.shape[-1]), legend)
    check_alike({"x": x, "state": state}, {})
