"""Linear attention in plain torch: the definition, the recurrence, and the blocked form that runs.

Shapes: B batch, T time, H heads, K key width, V value width, C chunk, N = T / C. With a decay g per head:

    out_t = scale * (g^(t+1) q_t S_0 + sum_{s <= t} g^(t-s) (q_t . k_s) v_s)        S_t = g S_{t-1} + k_t v_t^T
"""

import functools
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from chela.ops.documents import each_document
from chela.ops.precision import wide_dtype

CHUNK = 64


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    decay: Tensor | None,
    state: Tensor | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run the form with linear cost; arguments as in `chela.ops.linear_attention`, already checked."""
    dtype, wide = v.dtype, wide_dtype(v.dtype)
    if silu:
        v = F.silu(v)
    q, k, v = q.to(wide) * scale, k.to(wide), v.to(wide)
    if decay is not None:
        decay = decay.to(wide)
    if not causal:
        return bidirectional(q, k, v).to(dtype), None
    form = any_length if torch.compiler.is_exporting() and isinstance(q.shape[1], torch.SymInt) else chunked
    run = functools.partial(form, decay=decay)
    if cu_seqlens is not None:
        out, state = each_document(run, (q, k, v), cu_seqlens, state)
    else:
        out, state = run(q, k, v, state)
    return out.to(dtype), state if return_state else None


def linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, scale: float, decay: Tensor | None, inplace: bool
) -> tuple[Tensor, Tensor]:
    """Take one token; arguments as in `chela.ops.linear_attention_step`, already checked."""
    dtype, wide = v.dtype, wide_dtype(v.dtype)
    out, after = step(q.to(wide) * scale, k.to(wide), v.to(wide), state, None if decay is None else decay.to(wide))
    return out.to(dtype), state.copy_(after) if inplace else after


def quadratic(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    state: Float[Tensor, "b h k v"] | None = None,
    decay: Float[Tensor, " h"] | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """The causal definition, with every pair of tokens written out: O(T^2)."""
    time = torch.arange(q.shape[1], device=q.device)
    lag = time[:, None] - time[None, :]
    gamma = q.new_ones(q.shape[2]) if decay is None else decay
    weight = (gamma[:, None, None] ** lag.clamp(min=0)).masked_fill(lag < 0, 0)  # [H, T, T]
    scores = torch.einsum("bthk,bshk->bhts", q, k) * weight
    out = torch.einsum("bhts,bshv->bthv", scores, v)
    to_end = gamma[:, None] ** time.flip(0)  # [H, T]
    after = torch.einsum("hs,bshk,bshv->bhkv", to_end, k, v)
    if state is not None:
        from_start = gamma[:, None] ** (time + 1)  # [H, T]
        out = out + torch.einsum("ht,bthk,bhkv->bthv", from_start, q, state)
        after = after + (gamma ** q.shape[1])[:, None, None] * state
    return out, after


def step(
    q: Float[Tensor, "b h k"],
    k: Float[Tensor, "b h k"],
    v: Float[Tensor, "b h v"],
    state: Float[Tensor, "b h k v"],
    decay: Float[Tensor, " h"] | None = None,
) -> tuple[Float[Tensor, "b h v"], Float[Tensor, "b h k v"]]:
    """One token: O(K V)."""
    kept = state if decay is None else decay[:, None, None] * state
    state = kept + k.unsqueeze(-1) * v.unsqueeze(-2)
    return torch.einsum("bhk,bhkv->bhv", q, state), state


def recurrent(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    state: Float[Tensor, "b h k v"] | None = None,
    decay: Float[Tensor, " h"] | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """One token after the other: O(T), and how a model generates."""
    state = _zeros(k, v) if state is None else state
    outs = []
    for t in range(q.shape[1]):
        out, state = step(q[:, t], k[:, t], v[:, t], state, decay)
        outs.append(out)
    return torch.stack(outs, dim=1), state


def chunked(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    state: Float[Tensor, "b h k v"] | None = None,
    decay: Float[Tensor, " h"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """Pairs inside a chunk, a running state between chunks: O(T), in matrix products.

    The loop over chunks is one small addition each; `torch.compile` unrolls it.
    """
    length = q.shape[1]
    state = _zeros(k, v) if state is None else state
    if length == 0:
        return torch.zeros_like(v), state
    whole = length - length % chunk
    if 0 < whole < length:  # the last, shorter chunk by itself
        head, state = chunked(q[:, :whole], k[:, :whole], v[:, :whole], state, decay, chunk)
        tail, state = chunked(q[:, whole:], k[:, whole:], v[:, whole:], state, decay, chunk)
        return torch.cat([head, tail], dim=1), state
    c = min(chunk, length)
    q, k, v = (rearrange(x, "b (n c) h w -> b h n c w", c=c) for x in (q, k, v))
    scores = (q @ k.mT).tril()  # [B, H, N, C, C]
    if decay is not None:
        place = torch.arange(c, device=q.device)
        gamma = decay[:, None, None, None]  # [H, 1, 1, 1], against [H, N, C, .]
        scores = scores * gamma ** (place[:, None] - place).clamp(min=0)
        q = q * gamma ** (place + 1)[:, None]  # from the chunk's start to t
        k = k * gamma ** (c - 1 - place)[:, None]  # from s to the chunk's end
    kept = 1.0 if decay is None else decay[:, None, None] ** c  # of the state, over a chunk
    before = []
    for added in (k.mT @ v).unbind(dim=2):  # [B, H, K, V] a chunk; unbound at once, or backward would be quadratic
        before.append(state)
        state = kept * state + added
    out = scores @ v + q @ torch.stack(before, dim=2)
    return rearrange(out, "b h n c w -> b (n c) h w"), state


def any_length(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    state: Float[Tensor, "b h k v"] | None = None,
    decay: Float[Tensor, " h"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """The blocked form without a loop, for an exported graph, whose length nobody knows yet.

    Zeros in front fill up the first chunk. The states between chunks are sums over all chunks before, [N, N] weights
    with a decay.
    """
    batch, length, heads = q.shape[:3]
    count: Any = (length + chunk - 1) // chunk
    if isinstance(length, torch.SymInt):  # a number out of a tensor: the exporter asks nothing about it
        count = torch.full((), length).add(chunk - 1).floor_divide(chunk).item()
        torch._check(count >= 1)
        torch._check(count * chunk >= length)

    def cut(x: Tensor) -> Tensor:
        padded = torch.cat([x.new_zeros(batch, count * chunk - length, heads, x.shape[3]), x], dim=1)
        return padded.reshape(batch, count, chunk, heads, x.shape[3]).permute(0, 3, 1, 2, 4)  # [B, H, N, C, .]

    gamma = q.new_ones(heads) if decay is None else decay
    place, number = torch.arange(chunk, device=q.device), torch.arange(count, device=q.device)
    near = gamma[:, None, None] ** (place[:, None] - place).clamp(min=0)  # [H, C, C]
    blocks, keys, values = cut(q), cut(k), cut(v)
    out = ((blocks @ keys.mT).tril() * near.unsqueeze(1)) @ values
    from_start, to_end = (gamma[:, None, None, None] ** lags[:, None] for lags in (place + 1, chunk - 1 - place))
    added = (keys * to_end).mT @ values  # [B, H, N, K, V]
    if decay is None:
        sums = torch.cat([torch.zeros_like(added[:, :, :1]), added], dim=2).cumsum(2)
        before, after = sums[:, :, :count], sums[:, :, -1]
    else:
        lags = number[:, None] - number - 1  # whole chunks between the end of one and the start of another
        far = (gamma[:, None, None] ** (chunk * lags.clamp(min=0))).masked_fill(lags < 0, 0)  # [H, N, N]
        before = torch.einsum("hnm,bhmkv->bhnkv", far, added)
        after = torch.einsum("hm,bhmkv->bhkv", gamma[:, None] ** (chunk * number.flip(0)), added)
    out = out + (blocks * from_start) @ before
    out = out.permute(0, 2, 3, 1, 4).reshape(batch, count * chunk, heads, v.shape[3])[:, count * chunk - length :]
    if state is not None:
        time = torch.arange(length, device=q.device)
        out = out + torch.einsum("ht,bthk,bhkv->bthv", gamma[:, None] ** (time + 1), q, state)
        after = after + (gamma**length)[:, None, None] * state
    return out, after


def bidirectional(
    q: Float[Tensor, "b t h k"], k: Float[Tensor, "b t h k"], v: Float[Tensor, "b t h v"]
) -> Float[Tensor, "b t h v"]:
    """All tokens see all tokens: `q (K^T V)`, O(T)."""
    return torch.einsum("bthk,bhkv->bthv", q, torch.einsum("bshk,bshv->bhkv", k, v))


def _zeros(k: Tensor, v: Tensor) -> Tensor:
    return k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3])
