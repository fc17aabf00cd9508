import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest

from chela.data import pathfinder_dashes, pathfinder_pictures
from chela.data.counter import below, child
from chela.data.pathfinder_dashes import PATH_X, PATHFINDER, Dashes
from chela.data.pathfinder_ground import Ground, Maps, ground_of
from chela.data.pathfinder_images import labels_of, scenes
from chela.data.pathfinder_paths import _attempt
from chela.data.pathfinder_pictures import FINE, dilate, disc, lanczos, line
from pathfinder_follower import joined  # pyrefly: ignore
from pathfinder_plain import child as plain_child  # pyrefly: ignore
from pathfinder_plain import plain_image  # pyrefly: ignore

EITHER = pytest.mark.parametrize("rules", [PATHFINDER, PATH_X], ids=["32 px", "128 px"])
VARIANT = replace(PATH_X, distractors=17)


def drawn(rules, count, *, seed=0, split=0, first=0):
    return scenes(rules, seed=seed, split=split, indices=np.arange(first, first + count))


# Random numbers


def test_keys_are_those_of_plain_integers():
    keys = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64)
    for number in (0, 7, 2**40):
        assert child(keys, number).tolist() == [plain_child(key, number) for key in keys.tolist()]


@pytest.mark.parametrize("bound", [2, 360, 3_000_000_000])
def test_draws_are_uniform(bound):
    draws = below(child(np.zeros(1, dtype=np.uint64), np.arange(40_000)), 3, bound)
    assert draws.min() >= 0
    assert draws.max() < bound
    shares = np.bincount(draws * 10 // bound if bound > 10 else draws) / len(draws)
    assert np.abs(shares - 1 / len(shares)).max() < 5 * math.sqrt(1 / len(shares) / len(draws))


# Pictures


@EITHER
def test_pictures_are_pillows(rules):
    """Every line, every picture, every mask, pixel for pixel."""
    image, draw = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageDraw")
    for margin in rules.margins:
        tables = Dashes(rules, margin)
        fine, coarse, centre = 2 * tables.reach * FINE + 1, 2 * tables.reach + 1, tables.reach * FINE
        for number, (sine, cosine) in enumerate(tables.steps):
            sign = 1 if number < 360 else -1
            dy, dx = (math.ceil(round(sign * rules.length * FINE * part, 9)) for part in (sine, cosine))
            canvas = image.new("L", (fine, fine))
            ends, width = [(centre, centre), (centre + dx, centre + dy)], round(rules.thickness * FINE)
            draw.Draw(canvas).line(ends, fill=255, width=width)
            assert np.array_equal(line(fine, dy, dx, width), canvas)
            mask = image.fromarray(dilate(np.asarray(canvas), margin * FINE))
            for ours, theirs in zip(tables.pictures, (canvas, mask), strict=True):
                small = theirs.resize((coarse, coarse), image.Resampling.LANCZOS)
                assert np.array_equal(ours[number], small)


@EITHER
def test_discs_are_pillows(rules):
    image, side = pytest.importorskip("PIL.Image"), rules.size * FINE
    for y, x in ((2, 2), (rules.size // 2, 7), (rules.size - 3, rules.size - 2)):
        rows, columns = np.ogrid[:side, :side]
        inside = (rows - FINE * y) ** 2 + (columns - FINE * x) ** 2 <= (FINE * rules.marker) ** 2
        canvas = image.fromarray((255 * inside).astype(np.uint8))
        whole = np.zeros((rules.size, rules.size), dtype=np.uint8)
        top, left, levels = disc(rules.size, rules.marker, y, x)
        whole[top : top + len(levels), left : left + levels.shape[1]] = levels
        assert np.array_equal(whole, canvas.resize((rules.size, rules.size), image.Resampling.LANCZOS))


def test_dilation_is_the_maximum_over_a_disc():
    picture, radius = np.random.default_rng(0).integers(0, 256, (9, 9)).astype(np.uint8), 2
    rows, columns = np.mgrid[:9, :9]
    for y, x in np.ndindex(9, 9):
        near = (rows - y) ** 2 + (columns - x) ** 2 <= radius * radius
        assert dilate(picture, radius)[y, x] == picture[near].max()


def test_every_rounding_is_clear_of_its_edge(monkeypatch):
    """So another mathematical library, a few last bits off, gives the same integers."""
    seen, fixed = [], pathfinder_pictures.fixed

    def spy(value, bits):
        seen.append(value * 2**bits)
        return fixed(value, bits)

    monkeypatch.setattr(pathfinder_pictures, "fixed", spy)
    monkeypatch.setattr(pathfinder_dashes, "fixed", spy)
    lanczos.cache_clear()
    for rules in (PATHFINDER, PATH_X):
        lanczos(rules.size * FINE, rules.size)
        for margin in rules.margins:
            Ground(rules, margin)
    assert len(seen) > 10_000
    from_edge = np.abs(np.array(seen) - np.floor(seen) - 0.5)
    last_bits = np.maximum(np.abs(seen), 2**20) * 2.0**-50  # eight units in the last place
    assert (from_edge > last_bits).all()


class Shaky:
    """Python's `math` whose sines, cosines and angles are a few last bits off."""

    def __init__(self):
        self.draws = np.random.default_rng(0)

    def __getattr__(self, name):
        exact = getattr(math, name)
        if name not in ("sin", "cos", "atan2"):
            return exact
        return lambda *x: exact(*x) * (1 + int(self.draws.integers(-3, 4)) * 2.0**-53)


def test_a_mathematical_library_that_is_a_little_off_gives_the_same_images(monkeypatch):
    before = drawn(PATHFINDER, 64), drawn(VARIANT, 4)
    caches = (lanczos, disc, ground_of)
    for cache in caches:
        cache.cache_clear()
    for module in (pathfinder_dashes, pathfinder_pictures):
        monkeypatch.setattr(module, "math", Shaky())
    try:
        after = drawn(PATHFINDER, 64), drawn(VARIANT, 4)
    finally:
        for cache in caches:
            cache.cache_clear()
    for ours, theirs in zip(before, after, strict=True):
        assert np.array_equal(ours.pixels, theirs.pixels)


# Images


@EITHER
def test_images_are_those_of_the_plain_rules(rules):
    indices = np.arange(12 if rules is PATHFINDER else 3)
    found = scenes(rules, seed=3, split=1, indices=indices)
    for index, pixels, label in zip(indices.tolist(), found.pixels, found.labels, strict=True):
        plain, plain_label = plain_image(rules, 3, 1, index)
        assert label == plain_label
        assert np.array_equal(pixels, plain)


@pytest.mark.parametrize(
    ("rules", "count", "digest"),
    [
        (PATHFINDER, 64, "265691a4b993b8309f63d6e098932a0087293c88b66c462d4176e0ae32d25706"),
        (PATH_X, 16, "0bf34a4f54bd6b0324f8e33227b973d2ada3a0ec852e629e2699be5384d0d254"),
        (VARIANT, 4, "0da670289a0754c8d768778edd6ae3d6c2eda5e6c5500c8bdad8a7cca178c792"),
    ],
    ids=["32 px", "128 px", "128 px, 17 distractors"],
)
def test_bytes_are_the_same_on_every_machine(rules, count, digest):
    found = drawn(rules, count)
    assert hashlib.sha256(found.pixels.tobytes() + found.labels.tobytes()).hexdigest() == digest


@EITHER
def test_an_image_depends_on_its_seed_split_and_index_alone(rules):
    few = drawn(rules, 6)
    alone = scenes(rules, seed=0, split=0, indices=np.array([4, 1]))
    assert np.array_equal(alone.pixels, few.pixels[[4, 1]])
    assert np.array_equal(alone.paths, few.paths[[4, 1]])
    for others in (drawn(rules, 6, seed=1), drawn(rules, 6, split=1), drawn(rules, 6, first=6)):
        assert not any(np.array_equal(ours, theirs) for ours in few.pixels for theirs in others.pixels)
    assert np.array_equal(labels_of(rules, seed=0, split=0, indices=np.arange(6)), few.labels)


def test_the_variant_only_adds_distractors():
    usual, more = drawn(PATH_X, 8), drawn(VARIANT, 8)
    assert np.array_equal(usual.paths, more.paths)
    assert np.array_equal(usual.labels, more.labels)
    assert np.array_equal(usual.distractors, more.distractors[:, :8])
    assert (more.distractors[:, 8:] >= 0).any()


@EITHER
def test_discs_are_seen_where_the_label_says(rules):
    """On the pixels alone: both discs are there, at two ends of one path or of two."""
    found = drawn(rules, 40)
    for pixels, label, paths, marks in zip(found.pixels, found.labels, found.paths, found.marks, strict=True):
        ends = [paths[marks[0], 0], paths[marks[1], -1]]
        assert (marks[0] == marks[1]) == label
        other_ends = [paths[path, dash] for path in (0, 1) for dash in (0, -1)]
        looks = {tuple(at): _disc_seen(rules, pixels, at) for at in map(tuple, other_ends)}
        assert {at for at, seen in looks.items() if seen} >= set(map(tuple, ends))
        if rules is PATH_X:  # nothing else is as bright there
            brightest = np.argwhere(pixels == 255)
            apart = np.stack([np.hypot(*(brightest - end).T) for end in ends]).min(axis=0)
            assert apart.max() < rules.marker + 1


def _disc_seen(rules, pixels, at):
    top, left, levels = disc(rules.size, rules.marker, *map(int, at))
    part = pixels[top : top + len(levels), left : left + levels.shape[1]].astype(float)
    brightest = rules.marker_contrast / max(rules.marker_contrast, rules.distractor_contrast, rules.target_contrast)
    return bool((part >= np.floor(levels * brightest)).all())


@EITHER
def test_paths_are_chains_of_lit_dashes(rules):
    found = drawn(rules, 40)
    for pixels, margin, paths in zip(found.pixels, found.margins, found.paths, strict=True):
        assert paths.min() >= 0
        assert paths.max() < rules.size
        heads = paths[:, 1:]
        spacing = np.hypot(*np.moveaxis(np.diff(heads, axis=1), -1, 0))
        assert spacing.max() <= rules.length + 2 * margin + (rules.length + margin) + 2
        lit = [pixels[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].max() for y, x in paths.reshape(-1, 2)]
        assert min(lit) > 60


@pytest.mark.slow
def test_a_follower_that_sees_only_pixels_agrees_with_the_labels():
    """It is right on 82 % of 1,000 images; here it must beat a coin by five standard errors."""
    found = drawn(PATH_X, 100, split=2)
    answers = np.array([joined(pixels) for pixels in found.pixels])
    said_no, said_yes = (answers[found.labels == label].mean() for label in (0, 1))
    assert np.mean(answers == found.labels) > 0.5 + 5 * math.sqrt(0.25 / len(answers))
    assert said_yes > 0.5 > said_no


def _numbers(rules, count):
    """Mean, deviation and share of zeros of the pixels, and distractors an image, each with its standard error."""
    found = drawn(rules, count)
    pixels = found.pixels.reshape(count, -1).astype(float)
    first, second = pixels.mean(1), (pixels**2).mean(1)
    std = math.sqrt(second.mean() - first.mean() ** 2)
    bent = (second - 2 * first.mean() * first) / (2 * std)  # what an image adds to the deviation, to first order
    placed = (found.distractors[:, :, 0, 0] >= 0).sum(1)
    rows = {"mean": first, "zeros": (pixels == 0).mean(1), "placed": placed}
    numbers = {name: (float(row.mean()), float(row.std())) for name, row in rows.items()}
    return {**numbers, "std": (std, float(bent.std()))}, found.labels


@pytest.mark.parametrize(
    ("rules", "count", "published_count", "published"),
    [
        (PATHFINDER, 2000, 500, {"mean": "20.2", "std": "51.0", "zeros": "0.66", "placed": "1.15"}),
        (PATH_X, 200, 64, {"mean": "7.9", "std": "35.7", "zeros": "0.86", "placed": "7.8"}),
        (VARIANT, 100, 64, {"mean": "11.3", "std": "41.8", "zeros": "0.80", "placed": "14.7"}),
    ],
    ids=["32 px", "128 px", "128 px, 17 distractors"],
)
def test_statistics_are_those_of_the_original_program(rules, count, published_count, published):
    """Within four standard errors of both samples, and half a unit in the last place that is known."""
    numbers, labels = _numbers(rules, count)
    for name, text in published.items():
        ours, spread = numbers[name]
        error = 4 * spread * math.sqrt(1 / count + 1 / published_count) + 0.5 * 10.0 ** -len(text.partition(".")[2])
        assert abs(ours - float(text)) < error, name
    assert abs(labels.mean() - 0.5) < 4 * math.sqrt(0.25 / count)


def test_as_many_attempts_are_needed_as_in_the_original_program():
    """At 32 pixels 323 for each pair of paths, measured over 500 pairs."""
    ground, attempts, block = Ground(PATHFINDER, 1), 200_000, 4000
    work = Maps(*np.empty((2, block * ground.points), dtype=np.uint8))
    keys = child(np.zeros(1, dtype=np.uint64), np.arange(attempts))
    pairs = sum(len(_attempt(ground, work, keys[start : start + block])[0]) for start in range(0, attempts, block))
    error = math.sqrt(1 / 500 + 1 / pairs)
    assert abs(math.log(attempts / pairs / 323)) < 4 * error
