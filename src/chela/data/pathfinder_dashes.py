"""Pathfinder's rules, and for each direction of a dash its picture, its mask and the turns that may follow: tables.

A point is (y, x), or y * side + x on a map, which is the image with a border; an angle's unit step is (sin, cos).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from chela.data.pathfinder_pictures import FINE, ceiled, dilate, fixed, floored, lanczos, line, sampled_down

WEIGHT_BITS = 16
"""Binary places of weights."""
CROSSING = 459
"""Two masks cross where their levels add up to 1.8, in 255ths."""


@dataclass(frozen=True)
class Rules:
    """The published parameters of a set of images (Linsley et al. 2018; Tay et al. 2021). Lengths are in pixels."""

    size: int
    """Side of the image."""
    length: int
    """Length of a dash."""
    thickness: float
    """Thickness of a dash."""
    margins: tuple[int, ...]
    """Half the gap between dashes; one is drawn for each image."""
    continuity: float
    """Turns are weighed as if they were this many times as sharp."""
    apart: int
    """Distance of the two paths' first points."""
    marker: float
    """Radius of a disc."""
    distractors: int
    """Short paths asked for; where there is no room there are fewer."""
    target_contrast: int
    """Brightness of the two paths' dashes, in 20ths."""
    distractor_contrast: int
    """Brightness of the distractors' dashes, in 20ths."""
    marker_contrast: int = 20
    """Brightness of the discs, in 20ths."""
    dashes: int = 14
    """Dashes of a path."""
    distractor_dashes: int = 4
    """Dashes of a distractor."""


PATHFINDER = Rules(
    size=32,
    length=2,
    thickness=0.5,
    margins=(1,),
    continuity=1.0,
    apart=7,
    marker=1.5,
    distractors=5,
    target_contrast=30,
    distractor_contrast=40,
)
PATH_X = Rules(
    size=128,
    length=5,
    thickness=1.5,
    margins=(2, 3),
    continuity=1.8,
    apart=20,
    marker=3,
    distractors=8,
    target_contrast=18,
    distractor_contrast=18,
)


@dataclass(frozen=True)
class Stamps:
    """For each direction the points of a picture that matter, around the dash's start.

    Rows are as long as the longest: shorter ones repeat their first point.
    """

    places: np.ndarray
    """Offsets on the map, int64 [directions, points]."""
    levels: np.ndarray
    """Gray levels there, uint8 [directions, points]."""


class Dashes:
    """All tables of one set of rules and one margin.

    Directions 0 to 359 are the degrees -180 to 179, for a path's first dash, which is drawn from its tail. The others
    are the turns: offsets of a dash's head from its pivot, for the dashes that follow, drawn from the head backwards.
    """

    def __init__(self, rules: Rules, margin: int) -> None:
        self.rules, self.margin = rules, margin
        self.reach = rules.length + math.ceil(rules.thickness) + margin
        """Half the side of a dash's picture."""
        self.border = self.reach + margin + 4
        """Points around the image on a map, enough for whatever a path looks at from inside."""
        self.side = rules.size + 2 * self.border
        """Side of a map."""
        radius = rules.length + margin
        arc = [k / radius for k in range(math.floor(2 * math.pi * radius) + 1)]  # one for each pixel of arc
        self.turns = sorted({(floored(radius * math.sin(a)), floored(radius * math.cos(a))) for a in arc})
        """(y, x) of a head from its pivot."""
        degrees = [math.radians(degree) for degree in range(-180, 180)]
        self.angles = degrees + [math.atan2(y, x) for y, x in self.turns]
        self.steps = [(math.sin(angle), math.cos(angle)) for angle in self.angles]

    def flat(self, points: np.ndarray) -> np.ndarray:
        """(y, x) int64 [..., 2] as offsets on a map, int64 [...]."""
        return points[..., 0] * self.side + points[..., 1]

    def moved(self, distance: int) -> np.ndarray:
        """Steps of this length in every direction, each coordinate rounded up: int64 [directions, 2]."""
        return np.array([[ceiled(distance * part) for part in step] for step in self.steps], dtype=np.int64)

    @cached_property
    def ring(self) -> np.ndarray:
        """The second path's first point from the first's, for each degree: int64 [360, 2], half a pixel rounded up."""
        steps = self.steps[:360]
        return np.array([[floored(self.rules.apart * part + 0.5) for part in step] for step in steps], dtype=np.int64)

    @cached_property
    def weights(self) -> np.ndarray:
        """Weight of each turn after each direction, int32 [turns, directions], 2^-16: cos^2 of the sharpened angle."""
        out = np.zeros((len(self.turns), len(self.angles)), dtype=np.int32)
        for row, turned in enumerate(self.angles[360:]):
            for column, before in enumerate(self.angles):
                apart = min(abs(turned - before), 2 * math.pi - abs(turned - before))
                sharp = min(self.rules.continuity * apart, math.pi / 2)
                out[row, column] = fixed(math.cos(sharp) ** 2, WEIGHT_BITS)
        return out

    @cached_property
    def pictures(self) -> tuple[np.ndarray, np.ndarray]:
        """Picture and mask of a dash around its start, for each direction: uint8 [directions, 2 reach + 1, same]."""
        fine, coarse = 2 * self.reach * FINE + 1, 2 * self.reach + 1
        width, taps = round(self.rules.thickness * FINE), lanczos(fine, coarse)
        drawn: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        pictures, masks = [], []
        for number, step in enumerate(self.steps):
            sign = 1 if number < 360 else -1
            end = ceiled(sign * self.rules.length * FINE * step[0]), ceiled(sign * self.rules.length * FINE * step[1])
            if end not in drawn:
                picture = line(fine, *end, width)
                mask = dilate(picture, self.margin * FINE)
                drawn[end] = sampled_down(picture, taps, taps), sampled_down(mask, taps, taps)
            pictures.append(drawn[end][0])
            masks.append(drawn[end][1])
        return np.stack(pictures), np.stack(masks)

    def stamps(self, pictures: np.ndarray, least: int = 1) -> Stamps:
        """Points of pictures [directions, side, side] that are at least this bright."""
        centre = pictures.shape[1] // 2
        places, levels = [], []
        for picture in pictures:
            points = np.argwhere(picture >= least)
            places.append(self.flat(points - centre))
            levels.append(picture[points[:, 0], points[:, 1]])
        longest = max(map(len, places))
        index = [np.where(np.arange(longest) < len(row), np.arange(longest), 0) for row in places]
        return Stamps(
            np.stack([row[i] for row, i in zip(places, index, strict=True)]),
            np.stack([row[i] for row, i in zip(levels, index, strict=True)]),
        )

    @cached_property
    def bodies(self) -> list[list[tuple[int, int]]]:
        """For each degree the points that must be free around a first dash's tail.

        They are those of its mask that are full, taken a pixel further down and to the right, as the original does.
        """
        near = self.rules.length + self.margin
        found = [np.argwhere(mask == 255) - self.reach + 1 for mask in self.pictures[1][:360]]
        return [[(int(y), int(x)) for y, x in points if max(abs(y), abs(x)) <= near] for points in found]
