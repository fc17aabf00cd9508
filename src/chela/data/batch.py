"""A batch, and the kinds of split that make one from indices."""

from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORED = -100
"""Label of a position that has no target (language models), as torch's cross-entropy takes it."""


@dataclass(frozen=True)
class Batch:
    """Some examples as tensors."""

    inputs: Int[Tensor, "b t"] | Float[Tensor, "b t c"]
    """Tokens int64 [B, T] or real values float32 [B, T, C]; shorter sequences are padded on the right."""
    labels: Int[Tensor, " b"] | Int[Tensor, "b t"]
    """Classes int64 [B]; for a language model the next token [B, T], or -100 where there is none."""
    mask: Bool[Tensor, "b t"] | None = None
    """True at real positions; None when nothing is padded."""
    second: Int[Tensor, "b t2"] | None = None
    """The other side of a pair."""
    second_mask: Bool[Tensor, "b t2"] | None = None
    """Its real positions."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Move every tensor to a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: x.to(device, non_blocking=non_blocking) for name, x in moved.items() if x is not None}
        return replace(self, **moved)


class Split(Protocol):
    """A part of a task: examples by index."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def batch(self, indices: np.ndarray) -> Batch:
        """The examples at `indices` int64 [B]: a pure function of them."""
        ...


@dataclass(frozen=True)
class FixedSplit:
    """Real-valued sequences of one length, kept as small integers: value = (raw - shift) / scale."""

    raw: np.ndarray
    """Raw values, uint8 [N, T] or [N, T, C]."""
    labels: np.ndarray
    """Classes, [N]."""
    shift: float
    """Subtracted."""
    scale: float
    """Divided by."""

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> Batch:
        """Standardised values float32 [B, T, C]."""
        values = torch.from_numpy(np.asarray(self.raw[indices], dtype=np.float32))
        values = (values if values.ndim == 3 else values.unsqueeze(-1)).sub_(self.shift).div_(self.scale)
        return Batch(values, torch.from_numpy(np.asarray(self.labels[indices], dtype=np.int64)))


@dataclass(frozen=True)
class RaggedSplit:
    """Token sequences of any length, one behind the other."""

    tokens: np.ndarray
    """All tokens, uint8 or wider, [total]."""
    ends: np.ndarray
    """End of each sequence in `tokens`, int64 [N]."""
    labels: np.ndarray
    """Classes, [N]."""
    shift: int = 0
    """Added to every token, so that 0 stays free for padding."""
    limit: int = 0
    """Longest sequence kept, the rest is cut; 0 keeps all."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        """Tokens of one sequence, int64."""
        start, stop = int(self.ends[index - 1]) if index else 0, int(self.ends[index])
        stop = min(stop, start + self.limit) if self.limit else stop
        return np.asarray(self.tokens[start:stop], dtype=np.int64) + self.shift

    def lengths(self) -> np.ndarray:
        """Length of every sequence, int64 [N]."""
        lengths = np.diff(self.ends, prepend=0)
        return np.minimum(lengths, self.limit) if self.limit else lengths

    def batch(self, indices: np.ndarray) -> Batch:
        """Tokens int64 [B, T], padded with 0 on the right to the longest of the batch."""
        rows = [self[int(index)] for index in indices]
        lengths = torch.tensor([len(row) for row in rows])
        longest = max(1, int(lengths.max()))
        inputs = torch.zeros(len(rows), longest, dtype=torch.int64)
        for place, row in zip(inputs, rows, strict=True):
            place[: len(row)] = torch.from_numpy(row)
        mask = torch.arange(longest) < lengths.unsqueeze(1)
        labels = torch.from_numpy(np.asarray(self.labels[indices], dtype=np.int64))
        return Batch(inputs, labels, None if bool(mask.all()) else mask)


@dataclass(frozen=True)
class StreamSplit:
    """Windows of one long token stream, side by side, for next-token prediction."""

    tokens: np.ndarray
    """The stream, [total]."""
    window: int
    """Targets a window."""

    def __len__(self) -> int:
        return max(1, -(-(len(self.tokens) - 1) // self.window))

    def batch(self, indices: np.ndarray) -> Batch:
        """Tokens int64 [B, window] and the token after each; the last window is filled up without targets."""
        rows = np.zeros((len(indices), self.window + 1), dtype=np.int64)
        labels = np.full((len(indices), self.window), IGNORED, dtype=np.int64)
        for row, label, index in zip(rows, labels, indices, strict=True):
            piece = self.tokens[index * self.window : (index + 1) * self.window + 1]
            row[: len(piece)] = piece
            label[: len(piece) - 1] = piece[1:]
        return Batch(torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(labels))
