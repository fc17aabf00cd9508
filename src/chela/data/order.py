"""Orders of examples: of training, a pure function of (seed, step), so that resuming needs one integer; and splits."""

from functools import lru_cache

import numpy as np
import torch


def indices_at(n: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Indices of the global batch of a step.

    The stream of examples is one seeded permutation of 0..n-1 an epoch, one behind the other; step s takes the
    places s * batch_size to (s + 1) * batch_size - 1, across the end of an epoch where they fall so.

    Args:
        n: number of training examples.
        batch_size: examples a step.
        step: number of the step, from 0.
        seed: seed of the run.

    Returns:
        int64 [batch_size].
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = places // n
    out = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = _permutation(n, seed, int(epoch))[places[here] % n]
    return out


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def consecutive_at(n: int, batch_size: int, step: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a step's batch where every row reads on: its window is the one after that of the step before.

    The rows start evenly spread over the stream, turned by the seed, and each goes through all of it, from the end to
    the beginning.

    Args:
        n: number of windows.
        batch_size: rows.
        step: number of the step, from 0.
        seed: seed of the run.

    Returns:
        The windows, int64 [batch_size], and which rows begin anew, bool [batch_size]: all at step 0, later those at
        the first window of the stream.
    """
    turn = int(np.random.default_rng([seed, n]).integers(n))
    windows = (turn + np.arange(batch_size) * n // batch_size + step) % n
    return windows, (windows == 0) | (step == 0)


def random_split(*sizes: int) -> list[np.ndarray]:
    """Parts of range(sum(sizes)), int64 each, as torch's `random_split` draws them with a generator of seed 42.

    S4, S5 and MEGA split CIFAR-10 and Pathfinder so.
    """
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(42)).numpy()
    return np.split(order, np.cumsum(sizes)[:-1])
