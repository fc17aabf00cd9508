"""What Pathfinder's paths grow on: maps of what is in their way, and where a dash may start or turn.

Many paths grow side by side, each on a map of its own, the maps laid end to end: a point is its place in that array.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from chela.data.counter import below
from chela.data.pathfinder_dashes import CROSSING, WEIGHT_BITS, Dashes, Rules, Stamps
from chela.data.pathfinder_pictures import dilate

OCCUPIED = 77
"""A point is occupied above 0.3, in 255ths."""
TRIES = 3
"""Draws of a dash before its path fails."""
LEAST_WEIGHT = 255 * (1 << WEIGHT_BITS) // 10_000
"""A path fails where the weights of its turns add up to 1e-4 or less."""

SINE_OF_PI, COSINE_OF_HALF_PI = 1.2246467991473532e-16, 6.123233995736766e-17
"""In doubles they are not zero. See `Ground.drifts`."""


@dataclass
class Maps:
    """What paths must keep clear of; uint8 [maps * points]."""

    mask: np.ndarray
    """Masks of the dashes, combined by maximum."""
    room: np.ndarray
    """How free a point is for a dash's head: 255 less the mask dilated by the margin."""

    def taken(self, which: np.ndarray, points: int) -> "Maps":
        """Copies of some of the maps."""
        return Maps(self.mask.reshape(-1, points)[which].ravel(), self.room.reshape(-1, points)[which].ravel())

    def put(self, which: np.ndarray, points: int, others: "Maps") -> None:
        """Write others over some of the maps."""
        self.mask.reshape(-1, points)[which] = others.mask.reshape(-1, points)
        self.room.reshape(-1, points)[which] = others.room.reshape(-1, points)


class Ground:
    """What all maps of one margin have in common. Directions are numbered as in `Dashes`."""

    def __init__(self, rules: Rules, margin: int) -> None:
        tables = Dashes(rules, margin)
        self.rules, self.tables, border = rules, tables, tables.border
        self.side, self.points = tables.side, tables.side**2
        pictures, masks = tables.pictures
        self.pictures = tables.stamps(pictures)
        self.masks = tables.stamps(masks)
        widened = tables.stamps(np.stack([dilate(np.pad(mask, margin), margin) for mask in masks]))
        self.widened = Stamps(widened.places, 255 - widened.levels)
        dark = tables.stamps(masks, CROSSING - 255)
        self.crossings = Stamps(dark.places, (CROSSING - dark.levels.astype(np.int64)).astype(np.uint8))
        """Levels of a map's mask from which on a dash crosses what is there."""
        self.heads, self.backs = tables.moved(rules.length), tables.moved(-(rules.length + margin))
        self.behind = tables.flat(self.heads + self.backs)
        """From a first dash's tail to its pivot."""
        self.turns = tables.flat(np.array(tables.turns))
        """From a pivot to the heads that are possible."""
        self.ahead = tables.flat(tables.moved(rules.length + 2 * margin))
        """From a dash's pivot to the next one's."""
        lean = {(True, False): 1, (False, True): 2}  # straight left; straight up or down
        self.leaning = np.array([0] * 360 + [lean.get((y == 0 and x < 0, x == 0), 0) for y, x in tables.turns])
        self.leaning[[90, 270]] = 2  # degrees -90 and 90
        self.drift = self.drifts()
        self.ring, self.weights = tables.flat(tables.ring), tables.weights
        self.bodies = [[y * self.side + x for y, x in body] for body in tables.bodies]

        inside, frame = np.zeros((2, self.side, self.side), dtype=np.uint8)
        inside[border:-border, border:-border] = 255
        frame[border:-border, border:-border] = 255
        frame[border + 1 : -border - 1, border + 1 : -border - 1] = 0
        self.inside = self.bits(inside)
        """Points of the image."""
        self.usable = [self._usable(body) for body in self.bodies]
        """Angles a first dash may have."""
        self.blank = Maps(frame.ravel(), np.where(inside > 0, 255 - dilate(frame, margin), 0).astype(np.uint8).ravel())

        band = border + 2 * rules.apart
        centre = inside.copy()
        centre[band:-band, band:-band] = 0
        free = [self.places(self.free(self.bits(centre), degree)) for degree in range(360)]
        """Where the first path may begin: so far inside that no first dash leaves the image."""
        self.first_counts = np.array([len(places) for places in free])
        self.first_places = np.zeros((360, max(self.first_counts)), dtype=np.int64)
        for row, places in zip(self.first_places, free, strict=True):
            row[: len(places)] = places

    def drifts(self) -> np.ndarray:
        """What rounding up adds to a step straight left (1) or straight up or down (2), int64 [3, points].

        The original rounds up doubles, where pi has a small positive sine and its half such a cosine. Added to a small
        coordinate it survives, so that a path straight left drifts down near the top edge, and an upright one to the
        right near the left edge. That bends enough paths at 32 pixels to show in the share of black pixels.
        """
        distance, coordinates = self.rules.length + 2 * self.tables.margin, np.arange(self.side) - self.tables.border
        out = np.zeros((3, self.side, self.side), dtype=np.int64)
        out[1] = self.side * (coordinates + distance * SINE_OF_PI > coordinates)[:, None]
        out[2] = coordinates + distance * COSINE_OF_HALF_PI > coordinates
        return out.reshape(3, -1)

    def bits(self, level: np.ndarray) -> int:
        """The occupied points of a map as one long integer."""
        return int.from_bytes(np.packbits(level.ravel() >= OCCUPIED, bitorder="little").tobytes(), "little")

    def places(self, bits: int) -> np.ndarray:
        """Points of a map whose bits are set, in order."""
        raw = np.frombuffer(bits.to_bytes(-(-self.points // 8), "little"), dtype=np.uint8)
        return np.flatnonzero(np.unpackbits(raw, bitorder="little"))

    def _usable(self, body: list[int]) -> bool:
        """Whether every point of the image has a point of the body inside of the image too.

        Where it has none, the original's dilation (OpenCV's) answers with a negative number, and its search for a
        place takes one for failure. At 32 pixels most angles fail for good in this way, which thins out distractors.
        """
        lost = self.inside
        for place in body:
            lost &= ~_shifted(self.inside, place)
        return not lost

    def free(self, occupied: int, degree: int) -> int:
        """Where a first dash of this angle may have its tail: nothing occupied lies under its body."""
        blocked = 0 if self.usable[degree] else self.inside
        for place in self.bodies[degree]:
            blocked |= _shifted(occupied, place)
        return self.inside & ~blocked

    def mark(self, maps: Maps, starts: np.ndarray, directions: np.ndarray) -> None:
        """Add a dash to each map."""
        at = starts[:, None] + self.masks.places[directions]
        maps.mask[at] = np.maximum(maps.mask[at], self.masks.levels[directions])
        at = starts[:, None] + self.widened.places[directions]
        maps.room[at] = np.minimum(maps.room[at], self.widened.levels[directions])

    def turned(
        self, maps: Maps, pivots: np.ndarray, directions: np.ndarray, keys: np.ndarray, draw: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose the next dash of each path.

        Args:
            maps: what is in the way.
            pivots: pivots of the last dashes, int64 [paths].
            directions: their directions, int64 [paths].
            keys: uint64 [paths].
            draw: number of the first of `TRIES` draws from each key.

        Returns:
            New pivots, and turns (-1 where there is none), int64 [paths].
        """
        pivots = pivots + self.ahead[directions] + self.drift[self.leaning[directions], pivots % self.points]
        sums = np.cumsum(self.weights[:, directions] * maps.room[self.turns[:, None] + pivots], axis=0, dtype=np.int32)
        turns = np.full(len(pivots), -1)
        left = np.flatnonzero(sums[-1] > LEAST_WEIGHT)
        for number in range(draw, draw + TRIES):
            within = sums[:, left]
            chosen = np.sum(within <= below(keys[left], number, within[-1]), axis=0)
            at = (pivots[left] + self.turns[chosen])[:, None] + self.crossings.places[360 + chosen]
            clear = ~np.any(maps.mask[at] >= self.crossings.levels[360 + chosen], axis=1)
            turns[left[clear]] = chosen[clear]
            left = left[~clear]
            if not len(left):
                break
        return pivots, turns


def _shifted(bits: int, place: int) -> int:
    return bits >> place if place >= 0 else bits << -place


@cache
def ground_of(rules: Rules, margin: int) -> Ground:
    """The ground of these rules, made once."""
    return Ground(rules, margin)
