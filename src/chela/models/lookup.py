"""Vectors of symbols, whose gradient is summed in the same order every time."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from chela.ops.deterministic import deterministic
from chela.ops.precision import no_autocast

FEW = 256
"""Most symbols whose gradient is a product; of more, a product is too much work."""


class Symbols(nn.Embedding):
    """A vector for each symbol."""

    def forward(self, input: Int[Tensor, "..."]) -> Float[Tensor, "... d"]:
        """The vectors of symbols [...], 0 to V - 1."""
        learning = self.training and torch.is_grad_enabled()
        return Lookup.apply(input, self.weight) if input.is_cuda and learning else super().forward(input)


class Lookup(torch.autograd.Function):
    """`F.embedding` with a gradient that is the same bit for bit in every run.

    torch's own, of symbols with many places each, adds atomically on a GPU (seen in 2.11), unless it is asked for
    deterministic algorithms. Of few symbols those are slow, as each has one thread a column; a product with the places
    of the symbols, 0 and 1, is not.
    """

    @staticmethod
    def forward(ctx: Any, symbols: Tensor, table: Tensor) -> Tensor:
        """Rows of the table [V, D] for symbols [...]."""
        ctx.save_for_backward(symbols)
        ctx.count = len(table)
        return F.embedding(symbols, table)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor]:  # pyrefly: ignore
        """Sum the gradients of all places of each symbol."""
        (symbols,) = ctx.saved_tensors
        if ctx.count > FEW:
            with deterministic():
                return None, torch.ops.aten.embedding_dense_backward(slope, symbols, ctx.count, -1, False)
        places = torch.arange(ctx.count, device=symbols.device)[:, None] == symbols.flatten()  # [V, N]
        with no_autocast(slope.device):
            return None, places.to(slope.dtype) @ slope.flatten(0, -2)
