"""The CHELA layer: short-long convolution and gated linear attention, fused by gates."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from chela.layers.attention import AttentionNorm, GatedLinearAttention
from chela.layers.long_kernel import KernelKind
from chela.layers.short_long_conv import ShortLongConv, ShortLongState
from chela.ops.dropout import draw_seed
from chela.ops.gated_output import WIDEST, gated_output, gated_output_with_moments
from chela.ops.impl import Impl, resolve
from chela.ops.moments import Moments, channel_moments


class LayerState(NamedTuple):
    """What one layer keeps of the past."""

    convolution: ShortLongState
    """The convolutions' last inputs."""
    attention: Float[Tensor, "b h k v"] | None
    """The running K^T V of the attention; None without attention."""


class ChelaLayer(nn.Module):
    """`y = p * h + (1 - p) * residual`, with `h = SiLU(z W_h + attention(x, z))`, `p = sigmoid(z W_p)`.

    z is the short-long convolution of x. The gated form is MEGA's (Ma et al. 2023), its moving average replaced by
    short-long convolutions and its softmax attention by linear attention (Liu et al. 2024).

    Args:
        d_model: width D.
        d_key: query and key width K, per head.
        d_value: value width over all heads.
        heads: attention heads.
        causal: past only.
        attention: False leaves the attention out (an ablation).
        attention_norm: see `GatedLinearAttention`.
        decay: see `GatedLinearAttention`.
        kernel_length: taps of the long convolution; 0 leaves it out.
        short_width: taps of the short convolution; 0 leaves it out.
        kernel: see `ShortLongConv`, as are taps_per_octave, branches, branch_norm, squash and tap_dropout.
        taps_per_octave: parameters an octave of the "multiscale" kernel.
        branches: widths of the short branches.
        branch_norm: batch norm on each branch.
        squash: soft threshold on the long taps.
        tap_dropout: share of long taps dropped while training.
        dropout: on h while training.

    Raises:
        ValueError: neither attention nor a convolution, or what the parts refuse.
    """

    def __init__(
        self,
        d_model: int,
        *,
        kernel_length: int,
        d_key: int = 64,
        d_value: int = 256,
        heads: int = 1,
        causal: bool = True,
        attention: bool = True,
        attention_norm: AttentionNorm = "rms",
        decay: bool = False,
        short_width: int = 4,
        kernel: KernelKind = "dense",
        taps_per_octave: int = 16,
        branches: tuple[int, ...] = (7, 31),
        branch_norm: bool = False,
        squash: float = 0.0,
        tap_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not (attention or kernel_length or short_width):
            raise ValueError("nothing mixes the sequence: switch on attention, kernel_length or short_width")
        self.d_model = d_model
        self.convolution = ShortLongConv(
            d_model,
            kernel_length=kernel_length,
            short_width=short_width,
            causal=causal,
            kernel=kernel,
            taps_per_octave=taps_per_octave,
            branches=branches,
            branch_norm=branch_norm,
            squash=squash,
            tap_dropout=tap_dropout,
        )
        self.attention = None
        if attention:
            self.attention = GatedLinearAttention(
                d_model,
                d_key=d_key,
                d_value=d_value,
                heads=heads,
                causal=causal,
                norm=attention_norm,
                decay=decay,
            )
        self.gates = nn.Linear(d_model, 2 * d_model)  # h and p
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        *,
        residual: Float[Tensor, "b t d"] | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        state: LayerState | None = None,
        return_state: bool = False,
        cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
        impl: Impl = "auto",
    ) -> tuple[Float[Tensor, "b t d"], LayerState | None]:
        """Mix the sequence `x` [B, T, D].

        Args:
            x: input.
            residual: what the gate mixes the result with; x itself by default (a pre-norm block passes its raw input).
            mask: True at real tokens.
            state: what an earlier call returned (causal only; not together with mask).
            return_state: also return the state after the last position (with a mask: padding must be on the left).
            cu_seqlens: int32 [N+1], document boundaries of a packed batch with B = 1 (causal only).
            impl: implementation of the ops.

        Returns:
            Output [B, T, D] and the state, or None.

        Raises:
            ValueError: mask together with state, or what the ops refuse.
        """
        options = {"state": state, "return_state": return_state, "cu_seqlens": cu_seqlens, "impl": impl}
        y, after, _ = self._run(x, residual, mask, moments=False, **options)
        return y, after

    def with_moments(
        self,
        x: Float[Tensor, "b t d"],
        *,
        residual: Float[Tensor, "b t d"] | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
        **options: Any,
    ) -> tuple[Float[Tensor, "b t d"], LayerState | None, Moments]:
        """Mix the sequence and give the moments of the output's channels, too, over real positions: for batch norm.

        Arguments and errors are `forward`'s.
        """
        y, after, moments = self._run(x, residual, mask, moments=True, **options)
        return y, after, channel_moments(y, mask) if moments is None else moments

    def _run(
        self,
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        *,
        moments: bool,
        state: LayerState | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        impl: Impl = "auto",
    ) -> tuple[Tensor, LayerState | None, Moments | None]:
        """Output, state and, where the kernels add them up and they are asked for, moments."""
        before = state or LayerState(ShortLongState(None, None), None)
        z, convolution = self.convolution(
            x,
            mask=mask,
            state=state.convolution if state else None,
            return_state=return_state,
            cu_seqlens=cu_seqlens,
            impl=impl,
        )
        residual = x if residual is None else residual
        if self.attention is None:
            h, p = self.gates(z).chunk(2, dim=-1)
            return self._gate(h, p, residual), _state(convolution, None), None
        # One product makes gate, h and p, and their gradients come back as one tensor; S has a product of its own.
        d_key, d_value = self.attention.widths
        basis, gates = self.attention.from_z, self.gates
        shared = F.linear(z, basis.weight[:d_key], basis.bias[:d_key])
        weight, bias = torch.cat([basis.weight[d_key:], gates.weight]), torch.cat([basis.bias[d_key:], gates.bias])
        mixed = F.linear(z, weight, bias)
        m, attended = self.attention.mix(
            x,
            shared,
            mask=mask,
            state=before.attention,
            return_state=return_state,
            cu_seqlens=cu_seqlens,
            impl=impl,
        )
        state = _state(convolution, attended)
        if self.d_model <= WIDEST and resolve(impl, x.device, "gated_output") == "triton":
            return self._gated_output(m, mixed, residual, mask, state, moments)
        gate, h, p = mixed.split([d_value, self.d_model, self.d_model], dim=-1)
        return self._gate(h + self.attention.finish(m, gate), p, residual), state, None

    def _gate(self, h: Tensor, p: Tensor, residual: Tensor) -> Tensor:
        return residual + torch.sigmoid(p) * (self.dropout(F.silu(h)) - residual)

    def _gated_output(
        self,
        m: Tensor,
        mixed: Tensor,
        residual: Tensor,
        mask: Tensor | None,
        state: LayerState | None,
        moments: bool,
    ) -> tuple[Tensor, LayerState | None, Moments | None]:
        """Norm, gate and product of the attention and the gate over the residual, in one op."""
        assert self.attention is not None
        dropout = self.dropout.p if self.training else 0.0
        inputs = m, mixed, residual, self.attention.out.weight, self.attention.out.bias
        options: dict[str, Any] = {
            "gain": self.attention.norm_gain,
            "heads": self.attention.heads,
            "dropout": dropout,
            "seed": draw_seed(dropout, m.device),
            "impl": "triton",
        }
        if moments:
            y, of_y = gated_output_with_moments(*inputs, mask=mask, **options)
            return y, state, of_y
        return gated_output(*inputs, **options), state, None


def _state(convolution: ShortLongState | None, attention: Tensor | None) -> LayerState | None:
    return None if convolution is None else LayerState(convolution, attention)
