"""One block of the stack: norm, CHELA layer, norm, feed-forward."""

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from chela.layers.chela import ChelaLayer, LayerState
from chela.layers.feed_forward import FeedForwardKind, SwiGLU, make_feed_forward
from chela.layers.norms import BatchNorm, NormKind, make_norm
from chela.ops.dropout import draw_seed
from chela.ops.feed_forward import feed_forward, fits
from chela.ops.impl import Impl, resolve
from chela.ops.moments import Moments
from chela.ops.precision import product_dtype


class ChelaBlock(nn.Module):
    """A CHELA layer and a feed-forward part, each with its norm before (pre-norm) or after it (post-norm).

    Args:
        layer: the sequence mixer; its gate is the residual connection.
        d_ff: width of the feed-forward part; 0 leaves it out.
        feed_forward: "mlp", "swiglu" or "bounded-swiglu" (see `make_feed_forward`).
        norm: "layer", "rms", "scale" or "batch".
        prenorm: norm before each half instead of after it; the stack then ends in a norm of its own.
        dropout: inside and after the feed-forward part.
    """

    def __init__(
        self,
        layer: ChelaLayer,
        *,
        d_ff: int = 256,
        feed_forward: FeedForwardKind = "mlp",
        norm: NormKind = "layer",
        prenorm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.prenorm, self.norm, self.dropout = prenorm, norm, dropout
        self.layer = layer
        self.layer_norm = make_norm(norm, layer.d_model)
        self.feed_forward = self.feed_forward_norm = None
        if d_ff > 0:
            self.feed_forward_norm = make_norm(norm, layer.d_model)
            self.feed_forward = make_feed_forward(feed_forward, layer.d_model, d_ff, dropout)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        state: LayerState | None = None,
        return_state: bool = False,
        cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
        impl: Impl = "auto",
    ) -> tuple[Float[Tensor, "b t d"], LayerState | None]:
        """Apply the block to `x` [B, T, D]; arguments and result as `ChelaLayer`'s."""
        carry = {
            "mask": mask,
            "state": state,
            "return_state": return_state,
            "cu_seqlens": cu_seqlens,
            "impl": impl,
        }
        if self.prenorm:
            moments = None
            normed = self._normed(x, mask, impl)
            if self.norm == "batch" and self.training and self._fused(x, impl):
                x, after, moments = self.layer.with_moments(normed, residual=x, **carry)
            else:
                x, after = self.layer(normed, residual=x, **carry)
            if self.feed_forward is not None and self.feed_forward_norm is not None:
                x = self._feed_forward(x, mask, moments, impl)
        else:
            x, after = self.layer(x, **carry)
            x = self.layer_norm(x, mask)
            if self.feed_forward is not None and self.feed_forward_norm is not None:
                x = self.feed_forward_norm(self._feed_forward(x, mask, None, impl), mask)
        return x, after

    def _normed(self, x: Tensor, mask: Tensor | None, impl: Impl) -> Tensor:
        """What the layer reads; batch norm writes it as products take it."""
        if isinstance(self.layer_norm, BatchNorm):
            return self.layer_norm(x, mask, dtype=product_dtype(x), impl=impl)
        return self.layer_norm(x, mask)

    def _fused(self, x: Tensor, impl: Impl) -> bool:
        """Whether the feed-forward part runs in one op."""
        part = self.feed_forward
        if part is None or resolve(impl, x.device, "feed_forward") != "triton":
            return False
        return fits(x, gated=isinstance(part, SwiGLU))

    def _feed_forward(self, x: Tensor, mask: Tensor | None, moments: Moments | None, impl: Impl) -> Tensor:
        """`x + feed_forward(norm(x))` (post-norm: of x itself); `moments` are what a batch norm trains with."""
        layers, norm = self.feed_forward, self.feed_forward_norm
        assert layers is not None
        assert norm is not None
        if not self._fused(x, impl):
            return x + layers(norm(x, mask) if self.prenorm else x)
        dropout = self.dropout if self.training else 0.0
        options: dict[str, Any] = {"dropout": dropout, "seed": draw_seed(dropout, x.device), "impl": impl}
        if self.prenorm:
            options["norm"] = self.norm
            options["gain"] = norm.gain if self.norm == "scale" else norm.weight
            options["shift"] = norm.bias if self.norm in ("layer", "batch") else None
        if self.prenorm and isinstance(norm, BatchNorm):
            options["mean"], options["rstd"] = norm.statistics(moments)
        if isinstance(layers, SwiGLU):
            gate, up = layers.gate_up.weight.chunk(2)
            return feed_forward(x, gate, None, layers.down.weight, None, w3=up, bounded=layers.bounded, **options)
        assert isinstance(layers, nn.Sequential)
        first, last = layers[0], layers[3]
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        return feed_forward(x, first.weight, first.bias, last.weight, last.bias, **options)
