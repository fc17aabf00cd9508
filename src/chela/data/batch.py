"""A batch, and the kinds of split that make one from indices."""

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chela.data.token_files import TokenFiles

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
    fresh: Bool[Tensor, " b"] | None = None
    """Where states are carried from step to step: True in rows that begin anew."""

    cu_seqlens: Int[Tensor, " n_plus_1"] | None = None
    """Where the documents of a packed row end, int32 [N + 1] from 0 to T; B is 1 then."""

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
    """Raw values, uint8 or int16, [N, T] or [N, T, C]."""
    labels: np.ndarray
    """Classes, [N]."""
    shift: float | tuple[float, ...]
    """Subtracted: one number, or one a channel."""
    scale: float | tuple[float, ...]
    """Divided by."""

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> Batch:
        """Standardised values float32 [B, T, C]."""
        values = torch.from_numpy(np.asarray(self.raw[indices], dtype=np.float32))
        values = values if values.ndim == 3 else values.unsqueeze(-1)
        values.sub_(torch.tensor(self.shift)).div_(torch.tensor(self.scale))
        return Batch(values, torch.from_numpy(np.asarray(self.labels[indices], dtype=np.int64)))


@dataclass(frozen=True)
class FixedTokens:
    """Token sequences of one length, such as pixels read as symbols."""

    tokens: np.ndarray
    """Tokens, uint8 or wider, [N, T]."""
    labels: np.ndarray
    """Classes, [N]."""

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> Batch:
        """Tokens int64 [B, T]."""
        tokens = torch.from_numpy(np.asarray(self.tokens[indices], dtype=np.int64))
        return Batch(tokens, torch.from_numpy(np.asarray(self.labels[indices], dtype=np.int64)))


def pixels(raw: np.ndarray, labels: np.ndarray, encoding: str, shift: float, scale: float) -> FixedSplit | FixedTokens:
    """Gray images uint8 [N, pixels] as examples: "real" values, or "tokens" of a vocabulary of 256 (LRA's own)."""
    return FixedTokens(raw, labels) if encoding == "tokens" else FixedSplit(raw, labels, shift, scale)


@dataclass(frozen=True)
class TextMeasure:
    """What the tokens of a split stand for, so that losses over any tokens can be compared."""

    token_bytes: np.ndarray
    """Bytes each token stands for, int64 [vocab]."""
    bytes: int
    """Of the split."""
    words: int = 0
    """Of the split, as its published results count them; 0 where they do not."""
    documents: int = 0
    """Of the split."""
    tokens: int = 0
    """Of the split."""

    def covered(self, labels: Int[Tensor, "b t"]) -> int:
        """Bytes that the labels stand for."""
        return int(self.token_bytes[labels[labels != IGNORED].numpy()].sum())


@dataclass(frozen=True)
class StreamSplit:
    """Windows of one long token stream, side by side, for next-token prediction."""

    consecutive: ClassVar[bool] = True
    """Each window goes on where the one before ends: a state can be carried from one to the next."""
    tokens: np.ndarray | TokenFiles
    """The stream, [total]."""
    window: int
    """Targets a window."""
    text: TextMeasure | None = None
    """What the tokens stand for."""

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
