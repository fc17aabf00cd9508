"""The explicit state of a causal model between two pieces of a sequence."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from chela.layers import LayerState, ShortLongState
from chela.ops.long_conv.online import OnlineState


@dataclass(frozen=True)
class ChelaState:
    """Everything a causal model keeps of the past, one entry a layer; rows are the batch.

    The attention keeps K x V numbers a head and the short convolution W - 1 inputs, whatever the length. The long
    convolution keeps its last inputs, up to L - 1 of them: its memory grows with the context until the kernel length
    bounds it. A state is never changed in place: keep an old one to go back to it. The exception is one of
    `CausalLM.online`, whose convolutions move on in place: keep a `clone` of it.
    """

    layers: tuple[LayerState, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> "ChelaState":
        """Apply `function` to every tensor (all have the batch in front)."""

        def apply(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else function(tensor)

        def move(layer: LayerState) -> LayerState:
            short, long = layer.convolution
            long = long.map(function) if isinstance(long, OnlineState) else apply(long)
            return LayerState(ShortLongState(apply(short), long), apply(layer.attention))

        return ChelaState(tuple(move(layer) for layer in self.layers))

    def tensors(self) -> list[Tensor]:
        """Every tensor, layer by layer."""
        parts = (part for layer in self.layers for part in (*layer.convolution, layer.attention) if part is not None)
        return [tensor for part in parts for tensor in (part.tensors() if isinstance(part, OnlineState) else [part])]

    def clone(self) -> "ChelaState":
        """Copy every tensor: changes to one state do not reach the other."""
        return self.map(Tensor.clone)

    def detach(self) -> "ChelaState":
        """Cut the gradient: truncated backpropagation through time starts anew here."""
        return self.map(Tensor.detach)

    def to(self, device: torch.device | str) -> "ChelaState":
        """Move to a device."""
        return self.map(lambda tensor: tensor.to(device))

    def select(self, rows: Tensor) -> "ChelaState":
        """Take rows of the batch: int64 [N], repeats allowed (beams), any order."""
        return self.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.tensors()[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held by all rows."""
        return sum(tensor.nbytes for tensor in self.tensors())
