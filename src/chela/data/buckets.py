"""Batches of like lengths: sorted inside a pool of some batches, again a pure function of (seed, step)."""

from functools import lru_cache

import numpy as np

from chela.data.order import indices_at


class Buckets:
    """The order of `indices_at`, `pool` batches of it at a time sorted by length, cut and taken in a seeded order.

    Every example is still seen once an epoch. Which ones meet in a batch depends on their lengths; over `pool` batches
    the mixture is that of the plain order.

    Args:
        lengths: length of every training example, int64 [N].
        batch_size: examples a step.
        seed: seed of the run.
        pool: batches sorted together.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, pool: int) -> None:
        self._lengths, self._batch_size, self._seed, self._pool = lengths, batch_size, seed, pool
        self._batches = lru_cache(maxsize=2)(self._sort)

    def at(self, step: int) -> np.ndarray:
        """Indices of the global batch of a step, int64 [batch_size], its sequences of nearly one length."""
        number, place = divmod(step, self._pool)
        return self._batches(number)[place]

    def _sort(self, number: int) -> np.ndarray:
        indices = indices_at(len(self._lengths), self._pool * self._batch_size, number, self._seed)
        ordered = indices[np.argsort(self._lengths[indices], kind="stable")].reshape(self._pool, self._batch_size)
        return ordered[np.random.default_rng([self._seed, self._pool, number]).permutation(self._pool)]
