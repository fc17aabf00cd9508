"""Cross-entropy from hidden vectors, in slices of positions: logits never fill memory."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from chela.ops.precision import no_autocast, wide_dtype

IGNORED = -100
"""Label of a position that has no target."""
SLICE = 2**24
"""Logits computed at once: 64 MiB in float32."""


def chunked_cross_entropy(
    x: Float[Tensor, "*n d"],
    weight: Float[Tensor, "vocab d"],
    bias: Float[Tensor, " vocab"] | None,
    labels: Int[Tensor, "*n"],
    *,
    logits_at_once: int = SLICE,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Sum of the cross-entropy of `softmax(x weight^T + bias)` and number of hits, over all labels that count.

    Each slice of positions is gone through once: its logits, its loss and, where a gradient will be asked for, at once
    the loss's gradient, which for a sum is known up to a factor. What is kept for the backward pass is one vector a
    position and one a symbol, [N, D] and [vocab, D], instead of logits [N, vocab] (the order of work is that of Liger
    Kernel's fused linear cross-entropy, Hsu et al. 2024). Products run in the dtype autocast asks for; the loss and
    the gradients of weight and bias are summed in float32 (float64 for float64).

    Args:
        x: hidden vectors [..., D].
        weight: of the head [vocab, D].
        bias: of the head [vocab].
        labels: int64 [...], 0 to vocab - 1, or -100 where there is no target.
        logits_at_once: a slice has this many logits at most, but at least one position.

    Returns:
        The loss in nats (float32, or float64 for float64) and the hits (int64), both without dimensions. The loss
        can be differentiated once.
    """
    dtype = x.dtype
    if dtype == torch.float32 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    inputs = x.reshape(-1, x.shape[-1]).to(dtype)
    learning = torch.is_grad_enabled()  # inside a Function it never is
    with no_autocast(x.device):
        return _ChunkedCrossEntropy.apply(inputs, weight, bias, labels.reshape(-1), logits_at_once, learning)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        logits_at_once: int,
        learning: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = wide_dtype(x.dtype)
        narrow = weight.to(x.dtype)  # [V, D]
        loss = torch.zeros((), dtype=wide, device=x.device)
        hits = torch.zeros((), dtype=torch.int64, device=x.device)
        wanted = [learning and needed for needed in ctx.needs_input_grad[:3]]
        dx = torch.empty_like(x) if wanted[0] else None
        dw = torch.zeros(weight.shape, dtype=wide, device=x.device) if wanted[1] else None
        db = torch.zeros(len(weight), dtype=wide, device=x.device) if wanted[2] else None
        rows = max(1, logits_at_once // len(weight))
        symbols = torch.arange(len(weight), device=x.device)
        for start in range(0, len(x), rows):
            part = x[start : start + rows]  # [n, D]
            label = labels[start : start + rows].unsqueeze(1)  # [n, 1]
            counts = label != IGNORED
            logits = F.linear(part, narrow, None if bias is None else bias.to(x.dtype)).to(wide)  # [n, V]
            hits += (logits.argmax(1, keepdim=True) == label).sum()
            total = logits.logsumexp(1, keepdim=True)
            loss += (total - logits.gather(1, label.clamp(min=0))).masked_fill(~counts, 0).sum()
            if not any(wanted):
                continue
            slope = logits.sub_(total).exp_()  # the softmax; minus one at the label: the gradient of the logits
            slope = torch.where(symbols == label, slope - 1, slope).masked_fill_(~counts, 0)
            if db is not None:
                db += slope.sum(0)
            slope = slope.to(x.dtype)
            if dx is not None:
                torch.mm(slope, narrow, out=dx[start : start + rows])
            if dw is not None:
                dw += slope.t() @ part
        ctx.save_for_backward(dx, dw, db)
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        gradients = [
            None if gradient is None else (gradient * slope).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None)
