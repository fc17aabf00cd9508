"""Pathfinder's rules once more, a point and a path at a time: slow, and nothing in common with the generator but draws.

Whole images are dilated anew for every dash, candidates and angles are computed where they are needed, fractions are
fractions. Only the pictures of dashes and discs are the generator's own; those are held to Pillow's.
"""

import math
from fractions import Fraction

import numpy as np

from chela.data.pathfinder_dashes import Dashes, Rules
from chela.data.pathfinder_pictures import disc

WORD = 2**64 - 1


def child(key: int, number: int) -> int:
    z = (key + 0x9E3779B97F4A7C15 * (number + 1)) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def below(key: int, number: int, bound: int) -> int:
    return (child(key, number) >> 32) * bound >> 32


def moved(point, angle, distance):
    """Rounded up; what is whole but for the last bits is whole."""
    return tuple(math.ceil(at + round(distance * part, 9)) for at, part in zip(point, unit(angle), strict=True))


def unit(angle):
    return math.sin(angle), math.cos(angle)


class Plain:
    def __init__(self, rules: Rules, margin: int) -> None:
        self.rules, self.margin, self.size = rules, margin, rules.size
        self.tables = Dashes(rules, margin)
        self.reach = rules.length + math.ceil(rules.thickness) + margin
        offsets = range(-margin, margin + 1)
        self.near = [(y, x) for y in offsets for x in offsets if y * y + x * x <= margin * margin]

    def pasted(self, pictures, number, start):
        """A dash's picture on an empty image."""
        out = np.zeros((self.size, self.size), dtype=np.int64)
        patch = pictures[number]
        for y, row in enumerate(patch, start[0] - self.reach):
            for x, level in enumerate(row, start[1] - self.reach):
                if 0 <= y < self.size and 0 <= x < self.size:
                    out[y, x] = level
        return out

    def mask(self, number, start):
        return self.pasted(self.tables.pictures[1], number, start)

    def over(self, picture, points):
        """Maximum of the picture over the points around each pixel that lie inside; -1 where none does."""
        out = np.full((self.size, self.size), -1, dtype=np.int64)
        for y, x in points:
            to_y, to_x = slice(max(0, -y), self.size - max(0, y)), slice(max(0, -x), self.size - max(0, x))
            of_y, of_x = slice(max(0, y), self.size - max(0, -y)), slice(max(0, x), self.size - max(0, -x))
            out[to_y, to_x] = np.maximum(out[to_y, to_x], picture[of_y, of_x])
        return out

    def turn(self, number):
        return self.tables.angles[number]

    def first(self, mask, degree, share):
        """Tail of a first dash, or None."""
        mask = mask.copy()
        mask[[0, -1]] = mask[:, [0, -1]] = 255
        reach = self.rules.length + self.margin
        body = [
            (y + 1 - self.reach, x + 1 - self.reach) for y, x in np.argwhere(self.tables.pictures[1][degree] == 255)
        ]
        covered = self.over(mask, [(y, x) for y, x in body if abs(y) <= reach and abs(x) <= reach])
        free = np.argwhere(covered <= 0.3 * 255)
        if covered.min() < 0 or not len(free):
            return None
        return tuple(map(int, free[share(len(free))]))

    def behind(self, tail, degree):
        angle = math.radians(degree - 180)
        head = moved(tail, angle, self.rules.length)
        return head, moved(head, angle + math.pi, self.rules.length + self.margin)

    def extended(self, mask, pivot, number, key, draw):
        """(pivot, number of the direction, head) of the next dash, or None."""
        length, margin, angle = self.rules.length, self.margin, self.turn(number)
        ahead = []
        for at, part in zip(pivot, unit(angle), strict=True):
            distance = (length + 2 * margin) * part
            ahead.append(math.ceil(at + (distance if abs(distance) < 1e-9 else round(distance, 9))))
        radius, (y, x) = length + margin, ahead
        points = set()
        for k in range(math.ceil(2 * math.pi * radius)):
            to_y, to_x = y + radius * math.sin(k / radius), x + radius * math.cos(k / radius)
            if 0 <= to_y < self.size and 0 <= to_x < self.size:
                points.add((int(to_y), int(to_x)))
        blocked = self.over(mask, self.near)
        heads, weights = sorted(points), []
        for head in heads:
            apart = abs(math.atan2(head[0] - y, head[1] - x) - angle)
            sharp = min(self.rules.continuity * min(apart, 2 * math.pi - apart), math.pi / 2)
            weights.append(round(math.cos(sharp) ** 2 * 2**16) * (255 - int(blocked[head])))
        total = sum(weights)
        if total < 1e-4 * 255 * 2**16:
            return None
        for attempt in range(3):
            share = below(key, draw + attempt, total)
            head = next(head for i, head in enumerate(heads) if sum(weights[: i + 1]) > share)
            number = 360 + self.tables.turns.index((head[0] - y, head[1] - x))
            if (mask + self.mask(number, head)).max() < Fraction(18, 10) * 255:
                return (y, x), number, head
        return None

    def pair(self, key):
        """Mask and [path][dash] (direction, start) of an attempt at two paths, or None."""
        rules, ring = self.rules, self.rules.apart
        mask = np.full((self.size, self.size), 255)
        mask[1:-1, 1:-1] = 0
        banded = np.full_like(mask, 255)
        banded[2 * ring : -2 * ring, 2 * ring : -2 * ring] = 0
        degrees = below(key, 0, 360), below(key, 1, 360)
        tail = self.first(banded, degrees[0], lambda count: below(key, 2, count))
        if tail is None:
            return None
        around = unit(math.radians(below(key, 3, 360) - 180))
        other = tuple(at + math.floor(round(ring * part, 9) + 0.5) for at, part in zip(tail, around, strict=True))
        paths = [[(degree, start)] for degree, start in zip(degrees, (tail, other), strict=True)]
        pivots = [self.behind(start, degree)[1] for ((degree, start),) in paths]
        for dash in range(1, rules.dashes):
            for path in (0, 1):
                number, start = paths[path][-1]
                found = self.extended(mask, pivots[path], number, key, 6 * dash + 3 * path)
                if found is None:
                    return None
                mask = np.maximum(mask, self.mask(number, start))
                pivots[path] = found[0]
                paths[path].append(found[1:])
        return np.maximum(mask, self.mask(*paths[1][-1])), paths

    def short(self, mask, key):
        """Mask and [dash] (direction, start) of an attempt at a distractor, or None."""
        if np.mean(mask <= 0.3 * 255) < 0.01:
            return None
        for attempt in range(3):
            degree, share = below(key, attempt, 360), child(key, 3 + attempt) >> 32
            tail = self.first(mask, degree, lambda count, share=share: count * share >> 32)
            if tail is None:
                return None
            head, pivot = self.behind(tail, degree)
            if all(0 <= at < self.size for at in (*head, *pivot)):
                break
        else:
            return None
        path = [(degree, tail)]
        for dash in range(1, self.rules.distractor_dashes):
            found = self.extended(mask, pivot, path[-1][0], key, 3 * (dash + 1))
            if found is None:
                return None
            mask = np.maximum(mask, self.mask(*path[-1]))
            pivot, path = found[0], [*path, found[1:]]
        return np.maximum(mask, self.mask(*path[-1])), path


def plain_image(rules: Rules, seed: int, split: int, index: int) -> tuple[np.ndarray, int]:
    """Gray levels and label of one image."""
    key = 0
    for number in (rules.size, seed, split, index):
        key = child(key, number)
    label, marked = below(key, 0, 2), below(key, 2, 2)
    plain = Plain(rules, rules.margins[below(key, 1, len(rules.margins))])
    attempts = (plain.pair(child(child(key, 3), number)) for number in range(100_000))
    mask, paths = next(found for found in attempts if found is not None)
    image = np.zeros((rules.size, rules.size), dtype=np.int64)
    for path in paths:
        for dash in path:
            drawn = plain.pasted(plain.tables.pictures[0], *dash)
            image = np.maximum(image, drawn * rules.target_contrast)
    for number in range(rules.distractors):
        for attempt in range(5):
            found = plain.short(mask, child(child(key, 4), 5 * number + attempt))
            if found is not None:
                mask = found[0]
                for dash in found[1]:
                    drawn = plain.pasted(plain.tables.pictures[0], *dash)
                    image = np.maximum(image, drawn * rules.distractor_contrast)
                break
    for y, x in (paths[marked][0][1], paths[marked if label else 1 - marked][-1][1]):
        top, left, levels = disc(rules.size, rules.marker, y, x)
        patch = image[top : top + levels.shape[0], left : left + levels.shape[1]]
        patch[:] = np.maximum(patch, levels.astype(np.int64) * rules.marker_contrast)
    assert image.min() == 0
    stretched = {v: math.floor(Fraction(255 * v, int(image.max())) + Fraction(1, 2)) for v in np.unique(image).tolist()}
    return np.vectorize(stretched.get)(image).astype(np.uint8), label
