"""What a task is to those who train on it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from chela.data.batch import Split


@dataclass(frozen=True)
class Task:
    """Three splits and what a model must know of them."""

    name: str
    """As on the command line."""
    kind: Literal["classifier", "two-tower", "causal-lm"]
    """What a model answers."""
    train: Split
    """Training examples."""
    val: Split
    """For choosing weights and settings."""
    test: Split
    """Touched once a run."""
    inputs: Literal["tokens", "real"]
    """Symbols or real values."""
    max_length: int
    """Longest sequence."""
    vocab: int = 0
    """Symbols, padding included (tokens)."""
    channels: int = 0
    """Values a step (real)."""
    classes: int = 0
    """Classes."""
    names: tuple[str, ...] = ()
    """What the classes are called, where their number says too little."""
    decode: Callable[[np.ndarray], str] | None = None
    """Tokens [T] of an example as text, where they are text."""
    baselines: dict[str, float] = field(default_factory=dict)
    """Test accuracy of trivial answers, computed from the data."""
    chance_loss: float = 0.0
    """Loss of the best constant answer, nats."""
    tokenizer: str = ""
    """Content of the tokenizer.json that made the tokens; empty where they are something else."""
    note: str = ""
    """What a reader of the result must know of the splits."""


def majority(train: np.ndarray, test: np.ndarray) -> float:
    """Accuracy on `test` of always answering the most frequent label of `train`."""
    return float(np.mean(test == np.bincount(train).argmax()))


def entropy(labels: np.ndarray) -> float:
    """Entropy of the labels in nats: the loss of the best constant answer."""
    share = np.bincount(labels) / len(labels)
    return float(-sum(p * math.log(p) for p in share if p > 0))


def differs(what: str, found: int, published: int) -> str:
    """A remark for a task's note where a count is not that of the published data, else nothing."""
    return "" if found == published else f"; {found:,} {what}, where the published data have {published:,}"
