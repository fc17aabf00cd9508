"""The explicit state of a causal model between two pieces of a sequence."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chela.layers import LayerState
from chela.models.transformer import KeyValues
from chela.ops.long_conv.online import OnlineState


@dataclass(frozen=True)
class ChelaState:
    """Everything a causal model keeps of the past, one entry a layer; rows are the batch.

    In a CHELA layer the attention keeps K x V numbers a head and the short convolution W - 1 inputs, whatever the
    length. The long convolution keeps its last inputs, up to L - 1 of them: its memory grows with the context until
    the kernel length bounds it. A Transformer's layer keeps the keys and values of the whole context. A state is never
    changed in place: keep an old one to go back to it. The exception is one of `CausalLM.online`, whose convolutions
    (or keys and values) move on in place: keep a `clone` of it.
    """

    layers: tuple[LayerState | KeyValues, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> "ChelaState":
        """Apply `function` to every tensor (all have the batch in front)."""
        return ChelaState(_map(self.layers, function))

    def tensors(self) -> list[Tensor]:
        """Every tensor, layer by layer."""
        return list(_tensors(self.layers))

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


def _map(part: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply to every tensor in nested tuples; named ones keep their names, numbers and None stay as they are."""
    if isinstance(part, Tensor):
        return function(part)
    if isinstance(part, OnlineState):
        return part.map(function)
    if isinstance(part, tuple):
        moved = [_map(item, function) for item in part]
        return type(part)(*moved) if hasattr(part, "_fields") else tuple(moved)
    return part


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, OnlineState):
        yield from part.tensors()
    elif isinstance(part, tuple):
        for item in part:
            yield from _tensors(item)
