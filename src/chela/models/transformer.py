"""A strong Transformer to measure CHELA against: rotary positions, softmax attention, SwiGLU, RMS norms in front."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from chela.layers.feed_forward import SwiGLU
from chela.layers.norms import NormKind, make_norm
from chela.ops.impl import Impl
from chela.ops.precision import wide_dtype

ROTARY_BASE = 10_000.0
STEP_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""What attends from single tokens: all but cuDNN, which plans anew, for milliseconds, at every number of keys."""


class KeyValues(NamedTuple):
    """What a softmax attention keeps of the past: everything."""

    keys: Float[Tensor, "b c h k"]
    """Rotated keys; places from `length` on are free."""
    values: Float[Tensor, "b c h k"]
    """Values."""
    begins: Int[Tensor, " b"] | None
    """The first place of each row that is not padding; None where nothing is."""
    length: int
    """Places taken."""
    in_place: bool = False
    """Whether steps write into the free places (`CausalLM.online`) instead of copying everything."""


class RotaryAttention(nn.Module):
    """Causal softmax attention over heads of d_model / heads, with rotary positions (Su et al. 2021).

    Args:
        d_model: width D; its share a head must be even.
        heads: number of heads H.
    """

    def __init__(self, d_model: int, *, heads: int) -> None:
        super().__init__()
        if d_model % (2 * heads):
            raise ValueError(f"d_model {d_model} is not an even number a head, with {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        state: KeyValues | None = None,
        return_state: bool = False,
        cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "b t d"], KeyValues | None]:
        """Attend over `x` [B, T, D] and what the state holds; arguments and result as `ChelaLayer`'s.

        Raises:
            ValueError: mask or cu_seqlens together with state; a state asked for after packed documents.
        """
        if state is not None and (mask is not None or cu_seqlens is not None):
            raise ValueError(
                "mask and cu_seqlens exclude state, for nothing can stand between a state and its tokens: "
                "give a mask with the first piece alone, and run each packed document alone"
            )
        if return_state and cu_seqlens is not None:
            raise ValueError("packed documents leave no state: run each document alone")
        q, k, v = rearrange(self.qkv(x), "b t (n h k) -> n b t h k", n=3, h=self.heads)
        past = 0 if state is None else state.length
        q, k = rotate(q, past), rotate(k, past)
        after = None
        if state is not None:
            after = _append(state, k, v)
            k, v = after.keys[:, : after.length], after.values[:, : after.length]
        elif return_state:
            # values of their own: a view would keep all of q, k, v in memory
            after = KeyValues(k, v.contiguous(), None if mask is None else mask.int().argmax(1), k.shape[1])
        begins = None if state is None else state.begins
        one = past > 0 and x.shape[1] == 1  # a single query sees all keys
        plain = mask is None and cu_seqlens is None and begins is None and (past == 0 or one)
        seen = None if plain else _seen(x, past, begins, mask, cu_seqlens)
        with sdpa_kernel(STEP_BACKENDS) if one else nullcontext():
            attended = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                attn_mask=seen,
                is_causal=plain and not one,
            )
        return self.out(rearrange(attended, "b h t k -> b t (h k)")), after if return_state else None


class TransformerBlock(nn.Module):
    """A mixer and a SwiGLU feed-forward part (Shazeer 2020), each behind a norm and beside a residual.

    Args:
        mixer: called as `RotaryAttention` is.
        d_model: width D.
        d_ff: width of the feed-forward part; 0 leaves it out.
        norm: "rms", "layer" or "scale".
        dropout: on the output of each half while training.
    """

    def __init__(
        self, mixer: nn.Module, d_model: int, *, d_ff: int, norm: NormKind = "rms", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.mixer = mixer
        self.mixer_norm = make_norm(norm, d_model)
        self.feed_forward = self.feed_forward_norm = None
        if d_ff > 0:
            self.feed_forward_norm = make_norm(norm, d_model)
            self.feed_forward = SwiGLU(d_model, d_ff)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        state: KeyValues | None = None,
        return_state: bool = False,
        cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
        impl: Impl = "auto",
    ) -> tuple[Float[Tensor, "b t d"], KeyValues | None]:
        """Apply the block to `x` [B, T, D]; arguments and result as `ChelaBlock`'s (`impl` has no influence)."""
        mixed, after = self.mixer(
            self.mixer_norm(x), mask=mask, state=state, return_state=return_state, cu_seqlens=cu_seqlens
        )
        x = x + self.dropout(mixed)
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x, after


def rotate(x: Float[Tensor, "b t h k"], first: int) -> Float[Tensor, "b t h k"]:
    """Turn each pair of entries (i, i + K/2) by an angle that grows with the position, counted from `first`."""
    rates = rotary_rates(x.shape[-1], x.device, wide_dtype(x.dtype))
    angles = (torch.arange(x.shape[1], device=x.device) + first).unsqueeze(1) * rates  # [T, K/2]
    cos, sin = (f(angles).unsqueeze(1) for f in (torch.cos, torch.sin))  # [T, 1, K/2]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def rotary_rates(width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Float[Tensor, " half_k"]:
    """Angle a position of each pair of a head of `width` K."""
    half = width // 2
    return ROTARY_BASE ** (-torch.arange(half, device=device, dtype=dtype) / half)


def initialise(model: nn.Module, layers: int) -> None:
    """Draw weights as GPT-2 does: normal, 0.02 wide, narrower by sqrt(2 layers) where a residual is added to."""
    for name, parameter in model.named_parameters():
        if name.endswith(("out.weight", "down.weight", "o_proj.weight")):
            nn.init.normal_(parameter, std=0.02 * (2 * layers) ** -0.5)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def with_room(state: KeyValues, room: int = 0) -> KeyValues:
    """A copy whose steps write in place, with room for so many more; 0, and when it is full, doubles it."""
    return _grown(state._replace(in_place=True), room)


def _append(state: KeyValues, keys: Tensor, values: Tensor) -> KeyValues:
    new = keys.shape[1]
    if not state.in_place:
        keys = torch.cat([state.keys[:, : state.length], keys], dim=1)
        values = torch.cat([state.values[:, : state.length], values], dim=1)
        return KeyValues(keys, values, state.begins, state.length + new)
    while state.length + new > state.keys.shape[1]:
        state = _grown(state)
    state.keys[:, state.length : state.length + new] = keys
    state.values[:, state.length : state.length + new] = values
    return state._replace(length=state.length + new)


def _grown(state: KeyValues, room: int = 0) -> KeyValues:
    room = room or max(64, state.length)
    keys, values = (F.pad(x[:, : state.length], (0, 0, 0, 0, 0, room)) for x in (state.keys, state.values))
    return state._replace(keys=keys, values=values)


def _seen(
    x: Tensor, past: int, begins: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Bool[Tensor, "b_or_1 1 t s"]:
    """Which keys (S, the past first) each query sees: its own past, nothing of padding or of other documents."""
    place = torch.arange(past + x.shape[1], device=x.device)  # [S]
    query = place[past:].unsqueeze(1)  # [T, 1]
    seen = (place <= query).unsqueeze(0)  # [1, T, S]
    if begins is not None:
        seen = seen & (place >= begins[:, None, None])
    if mask is not None:
        seen = seen & mask.unsqueeze(1)
    if cu_seqlens is not None:
        document = torch.bucketize(place, cu_seqlens, right=True)
        seen = seen & (document.unsqueeze(1) == document)
    return (seen | (place == query)).unsqueeze(1)  # padding sees itself: a softmax over nothing has no value
