"""Linear attention, causal and bidirectional, in time and memory linear in the length."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chela.ops.checks import check_alike, check_causal_only, check_documents, check_shape
from chela.ops.impl import Impl, resolve
from chela.ops.linear_attention import reference
from chela.ops.precision import no_autocast, wide_dtype


def linear_attention(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    *,
    causal: bool = True,
    scale: float = 1.0,
    decay: Float[Tensor, " h"] | None = None,
    state: Float[Tensor, "n h k v"] | None = None,
    return_state: bool = False,
    cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
    silu: bool = False,
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "n h k v"] | None]:
    """Attend with dot products in place of softmax weights: `out_t = scale * sum_s decay^(t-s) (q_t . k_s) v_s`.

    The sum runs over s <= t when causal and over all s otherwise. With a state S_0 carried in, causal rows also get
    `scale * decay^(t+1) q_t S_0`; the state after a token is `S_t = decay S_{t-1} + k_t v_t^T`. Sums are kept in
    float32 (float64 for float64). Nothing is normalised. (Katharopoulos et al. 2020, eq. 9-12; decay per head as in
    Sun et al. 2023, RetNet.)

    Args:
        q: queries [B, T, H, K].
        k: keys [B, T, H, K]. A token whose key is zero (padding) adds nothing anywhere.
        v: values [B, T, H, V], dtype of q.
        causal: past and present only.
        scale: factor on the output.
        decay: [H] in (0, 1], a factor per head and step; None is 1. Causal only.
        state: [B, H, K, V] float32 (float64 for float64), what an earlier call returned; packed: [N, H, K, V].
        return_state: also return the state after the last token.
        cu_seqlens: int32 [N+1], ends of N documents packed along T with B = 1 (FlashAttention's convention): starts
            at 0, never decreases, may repeat (empty documents), ends at T. A document's numbers never depend on
            its neighbours.
        silu: attend to silu(v), rounded to v's dtype, in place of v; not causal, the kernels take it on their way.
        impl: "auto" (Triton on CUDA, the reference elsewhere), "triton" or "reference".

    Returns:
        Output [B, T, H, V] in v's dtype, and the state [B, H, K, V] (packed: [N, H, K, V]), or None.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; decay, state or cu_seqlens without `causal=True`; the
            implementation cannot run here. The contents of decay and cu_seqlens are checked on the CPU only.
    """
    _check(q, k, v, decay, lead="B, T, H", legend="q, k [B, T, H, K], v [B, T, H, V]")
    check_causal_only(causal, state, return_state, cu_seqlens)
    if decay is not None and not causal:
        raise ValueError("decay needs causal=True")
    if cu_seqlens is not None:
        check_documents(cu_seqlens, q)
    if state is not None:
        rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _check_state(state, rows, q, v, "[B, H, K, V]" if cu_seqlens is None else "[N, H, K, V]")
    options = {
        "causal": causal,
        "scale": scale,
        "decay": decay,
        "state": state,
        "return_state": return_state,
        "cu_seqlens": cu_seqlens,
        "silu": silu,
    }
    if resolve(impl, q.device, "linear_attention") == "triton":
        from chela.ops.linear_attention import fused

        return fused.linear_attention(q, k, v, **options)
    with no_autocast(q.device):
        return reference.linear_attention(q, k, v, **options)


def linear_attention_step(
    q: Float[Tensor, "b h k"],
    k: Float[Tensor, "b h k"],
    v: Float[Tensor, "b h v"],
    state: Float[Tensor, "b h k v"],
    *,
    scale: float = 1.0,
    decay: Float[Tensor, " h"] | None = None,
    inplace: bool = False,
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "b h v"], Float[Tensor, "b h k v"]]:
    """Take one token: `S = decay S + k v^T`, `out = scale q S`. The state passed in stays as it was unless `inplace`.

    Args:
        q: query [B, H, K].
        k: key [B, H, K].
        v: value [B, H, V], dtype of q.
        state: [B, H, K, V] float32 (float64 for float64); zeros before the first token.
        scale: factor on the output.
        decay: [H] in (0, 1], or None.
        inplace: write the new state over the old one and return that tensor: no second state in memory, and the same
            address for a CUDA graph. Without gradients only.
        impl: as in `linear_attention`.

    Returns:
        Output [B, H, V] in v's dtype and the new state [B, H, K, V].

    Raises:
        ValueError: as in `linear_attention`; `inplace` while a gradient of an input is wanted.
    """
    _check(q, k, v, decay, lead="B, H", legend="q, k [B, H, K], v [B, H, V]")
    _check_state(state, q.shape[0], q, v, "[B, H, K, V]")
    if inplace and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, state, decay)):
        raise ValueError("inplace=True overwrites what gradients need: call the step under torch.no_grad()")
    if resolve(impl, q.device, "linear_attention") == "triton":
        from chela.ops.linear_attention import fused

        return fused.linear_attention_step(q, k, v, state, scale=scale, decay=decay, inplace=inplace)
    with no_autocast(q.device):
        return reference.linear_attention_step(q, k, v, state, scale=scale, decay=decay, inplace=inplace)


def _check(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, *, lead: str, legend: str) -> None:
    axes = lead.count(",") + 2
    if not (q.dim() == k.dim() == v.dim() == axes and q.shape == k.shape and q.shape[:-1] == v.shape[:-1]):
        got = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        raise ValueError(f"q and k must share one shape and v their first axes: {legend}; got {got}")
    check_alike({"q": q, "k": k, "v": v}, {"decay": decay})
    if decay is not None:
        check_shape("decay", decay, (q.shape[-2],), "[H]")
        if decay.device.type == "cpu" and not torch.compiler.is_compiling() and not ((decay > 0) & (decay <= 1)).all():
            raise ValueError(f"decay must lie in (0, 1]; got values from {float(decay.min())} to {float(decay.max())}")


def _check_state(state: Tensor, rows: int, q: Tensor, v: Tensor, legend: str) -> None:
    check_shape("state", state, (rows, q.shape[-2], q.shape[-1], v.shape[-1]), legend)
    if state.device != q.device:
        raise ValueError(f"state must be on the device of q, {q.device}; got {state.device}")
    wanted = wide_dtype(q.dtype)
    if state.dtype != wanted:
        raise ValueError(f"state must be {wanted} when q is {q.dtype} (sums are kept there); got {state.dtype}")
