"""Pathfinder's paths: two long ones, tried from scratch until both succeed, then short ones where there is room.

An attempt draws from a key of its own, so which one succeeds first does not depend on how many are tried side by side.
"""

import numpy as np

from chela.data.counter import below, child
from chela.data.pathfinder_ground import TRIES, Ground, Maps

MAP_BYTES = 16 << 20
"""Memory for the maps of attempts that are made side by side."""
DISTRACTOR_TRIES = 5
"""Attempts at a distractor before it is left out."""
LEAST_FREE = 0.01
"""No distractor starts where a smaller share of the points is free."""

Tracks = np.ndarray
"""Starts (points of maps laid end to end) and directions of dashes: int64 [2, ..., dashes]."""


def pairs(ground: Ground, keys: np.ndarray) -> tuple[Maps, Tracks]:
    """For each key the two paths of the first attempt that succeeds.

    Args:
        ground: what they grow on.
        keys: uint64 [images].

    Returns:
        Their maps, and their tracks [2, images, 2, dashes].
    """
    points, most = ground.points, max(16, MAP_BYTES // (2 * ground.points))
    work = Maps(*np.empty((2, most * points), dtype=np.uint8))
    maps = Maps(*np.empty((2, len(keys) * points), dtype=np.uint8))
    tracks = np.empty((2, len(keys), 2, ground.rules.dashes), dtype=np.int64)
    missing, tried = np.arange(len(keys)), np.zeros(len(keys), dtype=np.int64)
    while len(missing):
        now = missing[:most]
        each = most // len(now)
        which = np.repeat(now, each)
        good, lanes, found = _attempt(
            ground, work, child(keys[which], tried[which] + np.tile(np.arange(each), len(now)))
        )
        images, winners = np.unique(which[good], return_index=True)  # the first that succeeds for each image
        lanes = lanes[winners]
        maps.put(images, points, work.taken(lanes, points))
        tracks[:, images] = found[:, winners]
        tracks[0, images] += (points * (images - lanes))[:, None, None]
        tried[now] += each
        missing = np.setdiff1d(missing, images, assume_unique=True)
    return maps, tracks


def _attempt(ground: Ground, maps: Maps, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, Tracks]:
    """Try to grow two paths for each key.

    Args:
        ground: what they grow on.
        maps: at least as many as there are keys; written over.
        keys: uint64 [attempts].

    Returns:
        Which attempts succeeded, the maps they are on, int64 [n], and their tracks [2, n, 2, dashes].
    """
    length, points, first = ground.rules.dashes, ground.points, below(keys, 0, 360)
    tried = np.flatnonzero(ground.first_counts[first])
    keys, first, lanes = keys[tried], first[tried], np.arange(len(tried))
    second = below(keys, 1, 360)
    maps.mask.reshape(-1, points)[: len(lanes)] = ground.blank.mask
    maps.room.reshape(-1, points)[: len(lanes)] = ground.blank.room
    tail = ground.first_places[first, below(keys, 2, ground.first_counts[first])] + points * lanes
    other = tail + ground.ring[below(keys, 3, 360)]
    tracks = np.empty((2, len(lanes), 2, length), dtype=np.int64)
    tracks[:, :, 0, 0], tracks[:, :, 1, 0] = (tail, first), (other, second)
    pivots = np.stack([tail + ground.behind[first], other + ground.behind[second]])
    for dash in range(1, length):
        for path in (0, 1):
            last = tracks[:, lanes, path, dash - 1]
            draw = 2 * TRIES * dash + TRIES * path
            pivots[path], turns = ground.turned(maps, pivots[path], last[1], keys[lanes], draw)
            done = turns >= 0
            lanes, turns, pivots = lanes[done], turns[done], pivots[:, done]
            ground.mark(maps, *last[:, done])
            tracks[:, lanes, path, dash] = pivots[path] + ground.turns[turns], 360 + turns
    ground.mark(maps, *tracks[:, lanes, 1, -1])  # but not the first path's last dash: a distractor may touch it
    return tried[lanes], lanes, tracks[:, lanes]


def distractors(ground: Ground, maps: Maps, keys: np.ndarray) -> Tracks:
    """Grow short paths where there is room.

    Args:
        ground: what they grow on.
        maps: those of `pairs`, one for each key; the distractors are added.
        keys: uint64 [images].

    Returns:
        Tracks [2, images, distractors, distractor dashes]; starts are -1 where a distractor is left out.
    """
    rules, points = ground.rules, ground.points
    tracks = np.full((2, len(keys), rules.distractors, rules.distractor_dashes), -1)
    occupied = [ground.bits(mask) & ground.inside for mask in maps.mask.reshape(-1, points)]
    for number in range(rules.distractors):
        missing = np.arange(len(keys))
        for attempt in range(DISTRACTOR_TRIES):
            own = child(keys[missing], number * DISTRACTOR_TRIES + attempt)
            degrees = np.stack([below(own, draw, 360) for draw in range(TRIES)], axis=1).tolist()
            shares = np.stack([below(own, TRIES + draw, 1 << 32) for draw in range(TRIES)], axis=1).tolist()
            seeds = [_seed(ground, occupied[i], *draws) for i, *draws in zip(missing, degrees, shares, strict=True)]
            seeded = np.array([tail >= 0 for tail, _ in seeds], dtype=bool)
            firsts = np.array(seeds, dtype=np.int64).reshape(-1, 2)[seeded].T
            grown, lanes, found = _grow(ground, maps.taken(missing[seeded], points), own[seeded], firsts)
            images = missing[seeded][lanes]
            maps.put(images, points, grown)
            tracks[:, images, number] = found
            tracks[0, images, number] += (points * images)[:, None]
            for image in images:
                occupied[image] = ground.bits(maps.mask[image * points : (image + 1) * points]) & ground.inside
            missing = np.setdiff1d(missing, images, assume_unique=True)
    return tracks


def _seed(ground: Ground, occupied: int, degrees: list[int], shares: list[int]) -> tuple[int, int]:
    """Tail (-1: there is no room) and angle of a distractor's first dash.

    Args:
        ground: what it grows on.
        occupied: the points of the image that are, as bits.
        degrees: angles to try, one after the other while the dash leaves the image.
        shares: for each which of the free points is taken, in 2^-32 of their number.
    """
    rules, border = ground.rules, ground.tables.border
    if (ground.inside & ~occupied).bit_count() < LEAST_FREE * rules.size**2:
        return -1, 0
    for degree, share in zip(degrees, shares, strict=True):
        free = ground.free(occupied, degree)
        if not free:
            return -1, 0
        tail = int(ground.places(free)[free.bit_count() * share >> 32])
        head = np.array(divmod(tail, ground.side)) + ground.heads[degree]
        ends = np.stack([head, head + ground.backs[degree]])
        if border <= ends.min() and ends.max() < border + rules.size:
            return tail, degree
    return -1, 0


def _grow(ground: Ground, maps: Maps, keys: np.ndarray, firsts: np.ndarray) -> tuple[Maps, np.ndarray, Tracks]:
    """Extend the first dashes of distractors.

    Args:
        ground: what they grow on.
        maps: one for each; written over.
        keys: uint64 [n].
        firsts: tails, each on a map of its own, and angles: int64 [2, n].

    Returns:
        The maps of those that succeeded, which they are, int64 [m], and their tracks [2, m, dashes], each on a map of
        its own.
    """
    points, lanes = ground.points, np.arange(len(keys))
    tracks = np.empty((2, len(keys), ground.rules.distractor_dashes), dtype=np.int64)
    tracks[:, :, 0] = firsts
    tracks[0, :, 0] += points * lanes
    pivots = tracks[0, :, 0] + ground.behind[firsts[1]]
    for dash in range(1, ground.rules.distractor_dashes):
        last = tracks[:, lanes, dash - 1]
        pivots, turns = ground.turned(maps, pivots, last[1], keys[lanes], TRIES * (dash + 1))
        done = turns >= 0
        lanes, turns, pivots = lanes[done], turns[done], pivots[done]
        ground.mark(maps, *last[:, done])
        tracks[:, lanes, dash] = pivots + ground.turns[turns], 360 + turns
    ground.mark(maps, *tracks[:, lanes, -1])
    tracks[0] -= (points * np.arange(len(keys)))[:, None]
    return maps.taken(lanes, points), lanes, tracks[:, lanes]
