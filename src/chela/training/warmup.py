"""Short windows first: how a language model's batch is cut at each step, a function of the step alone."""

from dataclasses import replace

from chela.config import TrainConfig
from chela.data import Batch


def pieces_at(config: TrainConfig, length: int, step: int) -> int:
    """Pieces that each window is cut into: a power of two that falls to 1 in equal stages (Li et al. 2022).

    Args:
        config: `length_warmup` steps from windows of `first_length` to whole ones.
        length: of a whole window; it is halved as long as it divides and a half is not shorter than `first_length`.
        step: number of the step, from 0.
    """
    halvings = 0
    while length % 2 ** (halvings + 1) == 0 and length // 2 ** (halvings + 1) >= config.first_length:
        halvings += 1
    if step >= config.length_warmup:
        return 1
    return 2 ** (halvings - halvings * step // config.length_warmup)


def cut(batch: Batch, pieces: int) -> Batch:
    """Cut every row in `pieces` of equal length, one below the other: [B, T] becomes [B pieces, T / pieces]."""
    if pieces == 1:
        return batch
    length = batch.inputs.shape[1] // pieces
    names = [name for name in ("inputs", "labels", "mask") if getattr(batch, name) is not None]
    return replace(batch, **{name: getattr(batch, name).reshape(-1, length) for name in names})
