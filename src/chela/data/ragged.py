"""Splits of sequences of any length, kept one behind the other; a batch is padded on the right."""

from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from chela.data.batch import Batch


@dataclass(frozen=True)
class Sequences:
    """Token sequences by index, without labels."""

    tokens: np.ndarray
    """All tokens, uint8 or wider, [total]."""
    ends: np.ndarray
    """End of each sequence in `tokens`, int64 [N]."""
    _: KW_ONLY
    shift: int = 0
    """Added to every token, so that 0 stays free for padding."""
    limit: int = 0
    """Longest sequence kept, the rest is cut; 0 keeps all."""
    last: int = 0
    """Token that ends every sequence, within the limit; 0 for none."""

    def __getitem__(self, index: int) -> np.ndarray:
        """Tokens of one sequence, int64."""
        start, stop = _bounds(self.ends, index, self.limit - bool(self.last) if self.limit else 0)
        row = np.asarray(self.tokens[start:stop], dtype=np.int64) + self.shift
        return np.append(row, self.last) if self.last else row

    def lengths(self) -> np.ndarray:
        """Length of every sequence, int64 [N]."""
        lengths = np.diff(self.ends, prepend=0) + bool(self.last)
        return np.minimum(lengths, self.limit) if self.limit else lengths

    def labelled(self, labels: np.ndarray) -> "RaggedSplit":
        """The sequences as examples with a class each, `labels` [N]."""
        return RaggedSplit(self.tokens, self.ends, labels, shift=self.shift, limit=self.limit, last=self.last)


@dataclass(frozen=True)
class RaggedSplit(Sequences):
    """Token sequences with a class each."""

    labels: np.ndarray
    """Classes, [N]."""

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> Batch:
        """Tokens int64 [B, T], padded with 0 on the right to the longest of the batch."""
        inputs, mask = _pad([self[int(index)] for index in indices])
        return Batch(inputs, _labels(self.labels, indices), mask)


@dataclass(frozen=True)
class PairSplit:
    """Pairs of token sequences with a class each; a sequence may occur in many pairs and is kept once."""

    documents: Sequences
    """The sequences."""
    first: np.ndarray
    """Index of each pair's first sequence, [N]."""
    second: np.ndarray
    """Index of its second one, [N]."""
    labels: np.ndarray
    """Classes, [N]."""

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self) -> np.ndarray:
        """Length of the longer side of every pair, int64 [N]."""
        lengths = self.documents.lengths()
        return np.maximum(lengths[self.first], lengths[self.second])

    def batch(self, indices: np.ndarray) -> Batch:
        """Both sides as tokens int64 [B, T] and [B, T2], each padded with 0 on the right to its own longest."""
        sides = (_pad([self.documents[int(i)] for i in side[indices]]) for side in (self.first, self.second))
        (inputs, mask), (second, second_mask) = sides
        return Batch(inputs, _labels(self.labels, indices), mask, second, second_mask)


@dataclass(frozen=True)
class RaggedReal:
    """Real-valued sequences of one channel, kept as small integers: value = (raw - shift) / scale."""

    raw: np.ndarray
    """All raw values, int16, [total]."""
    ends: np.ndarray
    """End of each sequence in `raw`, int64 [N]."""
    labels: np.ndarray
    """Classes, [N]."""
    shift: float
    """Subtracted."""
    scale: float
    """Divided by."""
    limit: int = 0
    """Longest sequence kept, the rest is cut; 0 keeps all."""

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self) -> np.ndarray:
        """Length of every sequence, int64 [N]."""
        lengths = np.diff(self.ends, prepend=0)
        return np.minimum(lengths, self.limit) if self.limit else lengths

    def batch(self, indices: np.ndarray) -> Batch:
        """Standardised values float32 [B, T, 1], padded with 0 (the mean) on the right to the longest of the batch."""
        rows = [slice(*_bounds(self.ends, int(index), self.limit)) for index in indices]
        values, mask = _pad([(np.asarray(self.raw[row], dtype=np.float32) - self.shift) / self.scale for row in rows])
        return Batch(values.unsqueeze(-1), _labels(self.labels, indices), mask)


def _bounds(ends: np.ndarray, index: int, limit: int) -> tuple[int, int]:
    start, stop = int(ends[index - 1]) if index else 0, int(ends[index])
    return start, min(stop, start + limit) if limit else stop


def _labels(labels: np.ndarray, indices: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(labels[indices], dtype=np.int64))


def _pad(rows: list[np.ndarray]) -> tuple[Tensor, Bool[Tensor, "b t"] | None]:
    lengths = torch.tensor([len(row) for row in rows])
    longest = max(1, int(lengths.max()))
    padded = torch.zeros(len(rows), longest, dtype=torch.from_numpy(rows[0]).dtype)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = torch.from_numpy(row)
    mask = torch.arange(longest) < lengths.unsqueeze(1)
    return padded, None if bool(mask.all()) else mask
