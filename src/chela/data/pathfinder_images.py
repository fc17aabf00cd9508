"""Pathfinder images (Linsley et al. 2018), each a pure function of the rules, the seed, the split and its index.

Two paths of 14 dashes; a disc marks the beginning of one of them, and another disc the end of the same path (label 1)
or of the other one (label 0). Shorter paths distract.
"""

from dataclasses import dataclass

import numpy as np

from chela.data.counter import below, child
from chela.data.pathfinder_dashes import Rules
from chela.data.pathfinder_ground import ground_of
from chela.data.pathfinder_paths import distractors, pairs
from chela.data.pathfinder_pictures import disc

LABEL, MARGIN, MARKED, PAIRS, DISTRACTORS = range(5)
"""What an image's key is asked for, by number."""


@dataclass(frozen=True)
class Scenes:
    """Images and what is on them. A path's first dash is known by its tail, the others by their heads."""

    pixels: np.ndarray
    """Gray levels, uint8 [images, size, size]; each image reaches from 0 to 255."""
    labels: np.ndarray
    """1 where both discs lie on one path, uint8 [images]."""
    margins: np.ndarray
    """int64 [images]."""
    paths: np.ndarray
    """(y, x) of the dashes of the two paths, int64 [images, 2, dashes, 2]."""
    distractors: np.ndarray
    """The same of the distractors, int64 [images, distractors, dashes, 2]; -1 where there was no room."""
    marks: np.ndarray
    """Path whose beginning the first disc marks, and path whose end the second does: int64 [images, 2]."""


def labels_of(rules: Rules, *, seed: int, split: int, indices: np.ndarray) -> np.ndarray:
    """The images' labels alone, uint8 [images]: fair coins. Arguments as in `scenes`."""
    return below(_keys(rules, seed, split, indices), LABEL, 2).astype(np.uint8)


def scenes(rules: Rules, *, seed: int, split: int, indices: np.ndarray) -> Scenes:
    """Draw images. With more distractors asked for, the same images get more of them.

    Args:
        rules: what they look like.
        seed: seed of the set, from 0.
        split: number of the split, from 0.
        indices: which images, from 0, int64 [images].
    """
    keys, count, size = _keys(rules, seed, split, indices), len(indices), rules.size
    labels, marked = below(keys, LABEL, 2), below(keys, MARKED, 2)
    marks = np.stack([marked, np.where(labels == 1, marked, 1 - marked)], axis=1)
    margins = np.array(rules.margins)[below(keys, MARGIN, len(rules.margins))]
    paths = np.empty((count, 2, rules.dashes, 2), dtype=np.int64)
    short = np.empty((count, rules.distractors, rules.distractor_dashes, 2), dtype=np.int64)
    raw = np.empty((count, size, size), dtype=np.int64)
    for margin in np.unique(margins):
        rows, ground = np.flatnonzero(margins == margin), ground_of(rules, int(margin))
        side, border = ground.side, ground.tables.border
        maps, long_tracks = pairs(ground, child(keys[rows], PAIRS))
        short_tracks = distractors(ground, maps, child(keys[rows], DISTRACTORS))
        canvas = np.zeros(len(rows) * ground.points, dtype=np.uint16)
        for out, (starts, directions), contrast in (
            (paths, long_tracks, rules.target_contrast),
            (short, short_tracks, rules.distractor_contrast),
        ):
            for path, dash in np.ndindex(starts.shape[1:]):
                there = starts[:, path, dash] >= 0
                which = directions[there, path, dash]
                at = starts[there, path, dash][:, None] + ground.pictures.places[which]
                canvas[at] = np.maximum(canvas[at], ground.pictures.levels[which].astype(np.uint16) * contrast)
            place = np.stack(np.divmod(starts % ground.points, side), axis=-1) - border
            out[rows] = np.where(starts[..., None] >= 0, place, -1)
        raw[rows] = canvas.reshape(-1, side, side)[:, border:-border, border:-border]
    for image, both, (first, last) in zip(raw, paths, marks, strict=True):
        for y, x in (both[first, 0], both[last, -1]):
            top, left, levels = disc(size, rules.marker, int(y), int(x))
            part = image[top : top + len(levels), left : left + levels.shape[1]]
            np.maximum(part, levels.astype(np.int64) * rules.marker_contrast, out=part)
    return Scenes(_stretched(raw), labels.astype(np.uint8), margins, paths, short, marks)


def _keys(rules: Rules, seed: int, split: int, indices: np.ndarray) -> np.ndarray:
    """A key for each image, uint64; the number of distractors is not part of it."""
    key = np.zeros(1, dtype=np.uint64)
    for number in (rules.size, seed, split):
        key = child(key, number)
    return child(key, indices)


def _stretched(raw: np.ndarray) -> np.ndarray:
    """Each image's lowest to highest value as 0 to 255, halves rounded up: integers [images, y, x] to uint8."""
    low, high = raw.min(axis=(1, 2), keepdims=True), raw.max(axis=(1, 2), keepdims=True)
    return ((510 * (raw - low) + (high - low)) // (2 * (high - low))).astype(np.uint8)
