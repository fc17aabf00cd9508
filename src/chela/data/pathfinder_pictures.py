"""Lines, discs and Lanczos sampling in integers: how Pathfinder's pictures are drawn, pixel for pixel as by Pillow.

Sines, cosines and filter taps are rounded to fixed point where they enter, so that the last bit of a machine's
mathematical library does not matter (the tests hold every rounding clear of its edge).
"""

import math
from functools import cache

import numpy as np

FINE = 2
"""Pictures are drawn this many times finer, then sampled down."""
BITS = 20
"""Binary places of steps."""
TAP_BITS = 22
"""Binary places of filter taps."""


def fixed(value: float, bits: int) -> int:
    """A real number as an integer of 2^-bits; the only way by which real numbers enter."""
    return round(value * (1 << bits))


def ceiled(value: float) -> int:
    """The next integer up."""
    return -(-fixed(value, BITS) >> BITS)


def floored(value: float) -> int:
    """The next integer down."""
    return fixed(value, BITS) >> BITS


def line(side: int, dy: int, dx: int, width: int) -> np.ndarray:
    """A line from the centre of a square to the point (dy, dx) from it, drawn as Pillow draws it.

    Args:
        side: side of the square, odd.
        dy: rows down.
        dx: columns to the right.
        width: 1 (Bresenham's line) or 3 (a four-sided figure whose corners lie on the grid, with its edge).

    Returns:
        uint8 [side, side], 0 or 255.
    """
    assert width in (1, 3)
    out, centre = np.zeros((side, side), dtype=np.uint8), side // 2
    if width == 1:
        long, short = max(abs(dy), abs(dx)), min(abs(dy), abs(dx))
        for step in range(long + 1):
            aside = (2 * short * step + long) // (2 * long)
            y, x = (step, aside) if abs(dy) > abs(dx) else (aside, step)
            out[centre + (y if dy > 0 else -y), centre + (x if dx > 0 else -x)] = 255
        return out
    norm = math.sqrt(dy * dy + dx * dx)
    up, right = round(dx / norm), -round(dy / norm)
    corners = [(up, right), (dy + up, dx + right), (dy - up, dx - right), (-up, -right)]
    for y in range(-centre, centre + 1):
        left, stop = side, -side
        for (y0, x0), (y1, x1) in zip(corners, corners[1:] + corners[:1], strict=True):
            if y0 > y1:
                y0, x0, y1, x1 = y1, x1, y0, x0
            if y0 == y == y1:
                left, stop = min(left, x0, x1), max(stop, x0, x1)
            elif y0 <= y <= y1 and y0 < y1:
                over, under = 2 * (x0 * (y1 - y0) + (y - y0) * (x1 - x0)), y1 - y0
                left, stop = min(left, (over + under) // (2 * under)), max(stop, -((under - over) // (2 * under)))
        out[centre + y, centre + left : centre + stop + 1] = 255
    return out


def dilate(picture: np.ndarray, radius: int) -> np.ndarray:
    """Running maximum over a disc, x^2 + y^2 <= radius^2; outside of the picture nothing is."""
    padded = np.pad(picture, radius)
    out = np.zeros_like(picture)
    for y in range(-radius, radius + 1):
        for x in range(-radius, radius + 1):
            if y * y + x * x <= radius * radius:
                shifted = padded[radius + y :, radius + x :][: picture.shape[0], : picture.shape[1]]
                np.maximum(out, shifted, out=out)
    return out


@cache
def lanczos(fine: int, coarse: int) -> np.ndarray:
    """Taps of Lanczos down-sampling (three lobes), as Pillow rounds them: int64 [coarse, fine], 2^-22."""
    taps = np.zeros((coarse, fine), dtype=np.int64)
    scale = fine / coarse
    for out in range(coarse):
        centre = (out + 0.5) * scale
        first, stop = max(0, int(centre - 3 * scale + 0.5)), min(fine, int(centre + 3 * scale + 0.5))
        places = [(place - centre + 0.5) / scale for place in range(first, stop)]
        heights = [_sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0 for x in places]
        taps[out, first:stop] = [fixed(height / sum(heights), TAP_BITS) for height in heights]
    return taps


def _sinc(x: float) -> float:
    return math.sin(math.pi * x) / (math.pi * x) if x else 1.0


def sampled_down(picture: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Down-sample a uint8 picture with integer taps, first along the rows, then the columns, 8 bits in between."""
    half = 1 << (TAP_BITS - 1)
    across = np.clip((picture.astype(np.int64) @ columns.T + half) >> TAP_BITS, 0, 255)
    return np.clip((rows @ across + half) >> TAP_BITS, 0, 255).astype(np.uint8)


@cache
def disc(size: int, radius: float, y: int, x: int) -> tuple[int, int, np.ndarray]:
    """A marker's disc around (y, x) on an image of this size: its first row and column, and gray levels from there."""
    near = math.ceil(radius) + 4  # the filter's three lobes fall inside
    rows, columns = (slice(max(0, at - near), min(size, at + near + 1)) for at in (y, x))
    taps = lanczos(size * FINE, size)
    fine_y, fine_x = np.ogrid[: size * FINE, : size * FINE]
    inside = (fine_y - FINE * y) ** 2 + (fine_x - FINE * x) ** 2 <= (radius * FINE) ** 2
    levels = sampled_down((inside * 255).astype(np.uint8), taps[rows], taps[columns])
    return rows.start, columns.start, levels
