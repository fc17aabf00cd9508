"""Gated linear attention: queries and keys from the convolved sequence, values from the sequence itself."""

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from chela.layers.padding import check_mask
from chela.layers.short_long_conv import is_step
from chela.ops import linear_attention, linear_attention_step
from chela.ops.impl import Impl

AttentionNorm = Literal["rms", "sum", "none"]


class GatedLinearAttention(nn.Module):
    """Linear attention with a shared low-dimensional basis, an output norm and a gate (CHELA; form after MEGA).

    With z the convolved sequence: `S = SiLU(z W_s)`, per head `q = S q_gain + q_bias`, `k = S k_gain + k_bias`,
    `v = SiLU(x W_v)`, `M = norm(linear_attention(q, k, v))`, and the output is `(SiLU(z W_g) M) W_o`.

    Args:
        d_model: width D of x, z and the output.
        d_key: width K of queries and keys, per head.
        d_value: width of the values over all heads; a multiple of `heads`.
        heads: number of heads H.
        causal: past only.
        norm: "rms" (per head), "sum" (weights sum to one; features `elu + 1` keep them positive) or "none".
        decay: learn a decay per head (causal only).

    Raises:
        ValueError: a width out of its range, an unknown norm, or a decay that is not causal.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_key: int = 64,
        d_value: int = 256,
        heads: int = 1,
        causal: bool = True,
        norm: AttentionNorm = "rms",
        decay: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("d_key", d_key), ("d_value", d_value), ("heads", heads)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if d_value % heads:
            raise ValueError(f"d_value {d_value} is not a multiple of heads {heads}")
        if norm not in ("rms", "sum", "none"):
            raise ValueError(f"norm must be rms, sum or none; got {norm!r}")
        if decay and not causal:
            raise ValueError("decay needs causal=True")
        self.heads, self.causal, self.norm, self.scale = heads, causal, norm, d_key**-0.5
        self.widths = [d_key, d_value]
        self.from_z = nn.Linear(d_model, d_key + d_value)  # S and the gate
        self.from_x = nn.Linear(d_model, d_value)
        self.out = nn.Linear(d_value, d_model)
        self.q_gain = nn.Parameter(1 + 0.02 * torch.randn(heads, d_key))
        self.k_gain = nn.Parameter(1 + 0.02 * torch.randn(heads, d_key))
        self.q_bias = nn.Parameter(torch.zeros(heads, d_key))
        self.k_bias = nn.Parameter(torch.zeros(heads, d_key))
        self.norm_gain = nn.Parameter(torch.ones(d_value)) if norm == "rms" else None
        # sigmoid(9) = 0.9999 to sigmoid(1) = 0.73: memories of about 8,000 to 4 steps
        self.decay_logit = nn.Parameter(torch.linspace(9, 1, heads)) if decay else None

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        z: Float[Tensor, "b t d"],
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        state: Float[Tensor, "b h k v"] | None = None,
        return_state: bool = False,
        cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
        impl: Impl = "auto",
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b h k v"] | None]:
        """Attend: queries, keys and gate from `z`, values from `x`, both [B, T, D].

        Returns:
            Output [B, T, D] (arbitrary at padding) and the state after the last position, or None.

        Raises:
            ValueError: a mask of another shape or type, or together with state; or what the op refuses.
        """
        shared, gate = self.from_z(z).split(self.widths, dim=-1)
        attended, after = self.mix(
            x, shared, mask=mask, state=state, return_state=return_state, cu_seqlens=cu_seqlens, impl=impl
        )
        return self.finish(attended, gate), after

    def mix(
        self,
        x: Float[Tensor, "b t d"],
        shared: Float[Tensor, "b t k"],
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        state: Float[Tensor, "b h k v"] | None = None,
        return_state: bool = False,
        cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
        impl: Impl = "auto",
    ) -> tuple[Float[Tensor, "b t v"], Float[Tensor, "b h k v"] | None]:
        """Attend, without output norm, gate and product.

        Args:
            x: what the values are made of.
            shared: `z W_s`, before its SiLU.
            mask: as the other arguments, see `forward`.
            state: what an earlier call returned.
            return_state: also return the state.
            cu_seqlens: document boundaries.
            impl: implementation of the op.

        Returns:
            Heads side by side [B, T, V], and the state or None.

        Raises:
            ValueError: a mask of another shape or type, or together with state; or what the op refuses.
        """
        check_mask(mask, x, state)
        shared = F.silu(shared).unsqueeze(2)  # [B, T, 1, K]
        q = shared * self.q_gain.to(shared.dtype) + self.q_bias.to(shared.dtype)
        k = shared * self.k_gain.to(shared.dtype) + self.k_bias.to(shared.dtype)
        v = rearrange(self.from_x(x), "b t (h v) -> b t h v", h=self.heads)
        on_the_way = not self.causal and self.norm != "sum"  # the op takes SiLU of the values
        if not on_the_way:
            v = F.silu(v)
        if self.norm == "sum":
            q, k = F.elu(q) + 1, F.elu(k) + 1
            v = F.pad(v, (0, 1), value=1.0)  # a column of ones adds up the weights
        if mask is not None:
            k = k.masked_fill(~mask[:, :, None, None], 0)  # padding never counts, in the sum of weights neither
        decay = None if self.decay_logit is None else torch.sigmoid(self.decay_logit.float())
        if state is not None and is_step(x, return_state):
            q, k, v = (part.squeeze(1) for part in (q, k, v))
            attended, after = linear_attention_step(q, k, v, state, scale=self.scale, decay=decay, impl=impl)
            attended = attended.unsqueeze(1)
        else:
            attended, after = linear_attention(
                q,
                k,
                v,
                causal=self.causal,
                scale=self.scale,
                decay=decay,
                state=state,
                return_state=return_state,
                cu_seqlens=cu_seqlens,
                silu=on_the_way,
                impl=impl,
            )
        if self.norm == "sum":
            attended, weights = attended[..., :-1], attended[..., -1:]
            attended = attended / weights.clamp(min=1e-6)
        return rearrange(attended, "b t h v -> b t (h v)"), after

    def finish(self, attended: Float[Tensor, "b t v"], gate: Float[Tensor, "b t v"]) -> Float[Tensor, "b t d"]:
        """Norm, gate (before its SiLU) and product: what `mix` gave to width D."""
        if self.norm_gain is not None:
            heads = rearrange(attended, "b t (h v) -> b t h v", h=self.heads)
            heads = F.rms_norm(heads.float(), heads.shape[-1:], eps=1e-6).to(attended.dtype)
            attended = rearrange(heads, "b t h v -> b t (h v)") * self.norm_gain.to(attended.dtype)
        return self.out(F.silu(gate) * attended)
