"""Short documents packed in rows: whole ones side by side, with `cu_seqlens` instead of padding between them."""

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from chela.data.batch import IGNORED, Batch, TextMeasure
from chela.data.token_files import TokenFiles


@dataclass(frozen=True)
class PackedSplit:
    """Documents of a token stream, each alone, for next-token prediction; an example is a row of them.

    A document longer than a row is cut into pieces that fill one each, and a last one. Which pieces share a row is a
    function of their lengths and order alone.
    """

    tokens: np.ndarray | TokenFiles
    """All documents, [total]."""
    ends: np.ndarray
    """End of each in `tokens`, int64 [N]."""
    room: int
    """Tokens a row holds."""
    text: TextMeasure | None = None
    """What the tokens stand for."""

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: np.ndarray) -> Batch:
        """Rows, one behind the other: tokens int64 [1, B * room], cu_seqlens, and no target across documents.

        What is left over at the end is a document of zeros without targets. `cu_seqlens` is filled up with empty
        documents to a power of two of them, so that few different shapes come up.
        """
        starts, sizes, lasts = self._pieces
        pieces = np.concatenate([self._rows[int(index)] for index in indices])
        length = len(indices) * self.room
        inputs = np.zeros(length, dtype=np.int64)
        labels = np.full(length, IGNORED, dtype=np.int64)
        stops = np.cumsum(sizes[pieces])
        for piece, stop in zip(pieces, stops, strict=True):
            start, size = int(starts[piece]), int(sizes[piece])
            read = np.asarray(self.tokens[start : start + size + 1 - int(lasts[piece])], dtype=np.int64)
            inputs[stop - size : stop] = read[:size]
            labels[stop - size : stop - size + len(read) - 1] = read[1:]
        documents = 1 << len(pieces).bit_length()  # one more at least: what is left over
        cu_seqlens = np.full(documents + 1, length, dtype=np.int32)
        cu_seqlens[0], cu_seqlens[1 : len(stops) + 1] = 0, stops
        return Batch(
            torch.from_numpy(inputs).unsqueeze(0),
            torch.from_numpy(labels).unsqueeze(0),
            cu_seqlens=torch.from_numpy(cu_seqlens),
        )

    @cached_property
    def _pieces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start and size of every piece, and whether it ends its document; those without a target are left out."""
        begins = np.concatenate([[0], self.ends[:-1]]).astype(np.int64)
        lengths = self.ends - begins
        counts = -(-lengths // self.room)
        document = np.repeat(np.arange(len(lengths)), counts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = begins[document] + number * self.room
        sizes = np.minimum(self.ends[document] - starts, self.room)
        lasts = number == counts[document] - 1
        kept = (sizes > 1) | ~lasts
        return starts[kept], sizes[kept], lasts[kept]

    @cached_property
    def _rows(self) -> list[np.ndarray]:
        return fill_rows(self._pieces[1], self.room)


def fill_rows(sizes: np.ndarray, room: int) -> list[np.ndarray]:
    """Put pieces in rows, the largest first, each where it leaves the least room (best fit decreasing).

    Args:
        sizes: of the pieces, 1 to `room`, [N].
        room: of a row.

    Returns:
        The pieces of each row, in ascending order.
    """
    rows: list[list[int]] = []
    left: list[int] = []  # different rooms left, ascending
    open_rows: dict[int, list[int]] = defaultdict(list)  # rows by the room they have left
    for piece in np.argsort(-sizes, kind="stable"):
        size = int(sizes[piece])
        place = bisect_left(left, size)
        if place == len(left):
            free, row = room, len(rows)
            rows.append([])
        else:
            free = left[place]
            row = open_rows[free].pop()
            if not open_rows[free]:
                left.pop(place)
        rows[row].append(int(piece))
        rest = free - size
        if rest:
            if not open_rows[rest]:
                insort(left, rest)
            open_rows[rest].append(row)
    return [np.sort(np.array(row)) for row in rows]
