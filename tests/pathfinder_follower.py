"""Follows dashed paths on the pixels of a 128 x 128 image, by the lengths of dashes and gaps alone."""

import numpy as np

LENGTH, DASHES, MARGINS = 5, 14, (2, 3)
BEAM, FRAME = 60, 16
TURNS = np.radians(np.arange(-50, 51, 5))


def joined(pixels: np.ndarray) -> bool:
    """Whether the brightest chain of 14 dashes that begins at one disc ends at the other."""
    first, second = discs(pixels)
    chains = []
    for start, other in ((first, second), (second, first)):
        for margin in MARGINS:
            score, end = chain(pixels, start, margin)
            chains.append((score, bool(np.hypot(*(end - other)) < 8)))
    return max(chains)[1]


def discs(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the two discs, which alone are white."""
    spots = np.argwhere(pixels == 255)
    from_first = np.hypot(*(spots - spots[0]).T)
    from_last = np.hypot(*(spots - spots[from_first.argmax()]).T)
    return spots[from_first < from_last].mean(0), spots[from_first >= from_last].mean(0)


def chain(pixels: np.ndarray, start: np.ndarray, margin: int) -> tuple[float, np.ndarray]:
    """Score and end of the best chain: lit where dashes are, dark in the gaps, few turns; a beam search."""
    canvas = np.minimum(np.pad(pixels / 230, FRAME), 1)

    def light(points: np.ndarray) -> np.ndarray:
        y, x = np.clip(np.rint(points).astype(int) + FRAME, 0, len(canvas) - 1).T
        return canvas[y, x]

    angles = np.radians(np.arange(0, 360, 5))
    heads = start + LENGTH * unit(angles)
    scores = light(heads - 0.5 * unit(angles)) - light(heads + margin * unit(angles))
    for _ in range(DASHES - 1):
        pivots = np.repeat(heads + margin * unit(angles), len(TURNS), axis=0)
        angles = (angles[:, None] + TURNS).ravel()
        heads = pivots + (LENGTH + margin) * unit(angles)
        lit = np.mean([light(heads - back * unit(angles)) for back in (0.5, 2, 3.5, 4.5)], axis=0)
        dark = light(pivots) + light(heads + margin * unit(angles))
        turned = np.tile(np.abs(TURNS), len(scores))
        scores = np.repeat(scores, len(TURNS)) + lit - 0.5 * dark - 0.15 * turned
        order = np.argsort(-scores, kind="stable")
        alike = np.column_stack([np.rint(heads / 2), np.degrees(angles) // 20])[order]
        kept = order[np.sort(np.unique(alike, axis=0, return_index=True)[1])][:BEAM]
        heads, scores, angles = heads[kept], scores[kept], angles[kept]
    return float(scores[0]), heads[0]


def unit(angles: np.ndarray) -> np.ndarray:
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1)
