"""Random numbers by counting: a number is a function of a key and its place, in integers, the same on any machine.

Keys form a tree. A child is the finaliser of SplitMix64 (Steele, Lea and Flood 2014) on the parent plus a multiple of
the golden ratio, so that whoever holds a key draws without regard to what others draw, in any order.
"""

import numpy as np

GOLDEN, FIRST, SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def child(keys: np.ndarray, number: int | np.ndarray) -> np.ndarray:
    """Keys of the children with a number from 0 on: uint64 [...] to uint64 [...]."""
    z = keys + GOLDEN * (np.atleast_1d(np.asarray(number, dtype=np.uint64)) + np.uint64(1))
    z = (z ^ (z >> np.uint64(30))) * FIRST
    z = (z ^ (z >> np.uint64(27))) * SECOND
    return z ^ (z >> np.uint64(31))


def below(keys: np.ndarray, number: int | np.ndarray, bound: int | np.ndarray) -> np.ndarray:
    """Uniform integers 0 <= draw < bound, int64 [...]; bound is at most 2^32, and a share is off by 2^-32 at most."""
    high = child(keys, number) >> np.uint64(32)
    return ((high * np.asarray(bound, dtype=np.uint64)) >> np.uint64(32)).astype(np.int64)
