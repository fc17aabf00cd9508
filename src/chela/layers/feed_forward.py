"""The second half of a block: each position by itself, through a wider layer and back."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

FeedForwardKind = Literal["mlp", "swiglu"]


class SwiGLU(nn.Module):
    """`(SiLU(x A) * x B) C`, without biases (Shazeer 2020).

    Args:
        d_model: width D of input and output.
        d_ff: width of A's and B's products.
        dropout: on the hidden products and on the output, while training.
    """

    def __init__(self, d_model: int, d_ff: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Apply to vectors [..., D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.dropout(self.down(self.dropout(F.silu(gate) * up)))


def make_feed_forward(kind: FeedForwardKind, d_model: int, d_ff: int, dropout: float) -> nn.Module:
    """Two matrices around a SiLU, or three around its product with a gate (`SwiGLU`); dropout behind both products.

    Raises:
        ValueError: another kind.
    """
    if kind == "swiglu":
        return SwiGLU(d_model, d_ff, dropout=dropout)
    if kind != "mlp":
        raise ValueError(f"feed_forward must be mlp or swiglu; got {kind!r}")
    return nn.Sequential(
        nn.Linear(d_model, d_ff), nn.SiLU(), nn.Dropout(dropout), nn.Linear(d_ff, d_model), nn.Dropout(dropout)
    )
