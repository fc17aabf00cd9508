"""A tiny task and run for the tests of training; as a script, one process of such a run.

`python training_kit.py SETTINGS`, where SETTINGS is TOML of a RunConfig; DOUBLE=1 computes in float64.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console

from chela.config import RunConfig
from chela.data import Batch, Task
from chela.record import from_dict, load_toml, save_toml
from chela.training import Result, train
from chela.training.metrics import Kind

CLASSES, VOCAB, LENGTH = 3, 12, 16


@dataclass(frozen=True)
class Words:
    """Sequences of 6 to 16 tokens, right padded with 0; the class is a residue of the sum of tokens of at most 3."""

    tokens: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: np.ndarray) -> Batch:
        tokens = torch.from_numpy(self.tokens[indices])
        tokens = tokens[:, : int((tokens > 0).sum(1).max())]
        return Batch(tokens, torch.from_numpy(self.labels[indices]), tokens > 0, None, None)


@dataclass(frozen=True)
class Pairs(Words):
    """Two sequences, their class whether they begin alike."""

    def batch(self, indices: np.ndarray) -> Batch:
        first, second = super().batch(indices), super().batch((indices + 1) % len(self))
        labels = (first.inputs[:, 0] % 2 == second.inputs[:, 0] % 2).long()
        return replace(first, labels=labels, second=second.inputs, second_mask=second.mask)


@dataclass(frozen=True)
class Text(Words):
    """The next token; padding has none."""

    def batch(self, indices: np.ndarray) -> Batch:
        tokens = torch.from_numpy(self.tokens[indices])
        labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1)).masked_fill_(tokens == 0, -100)
        labels[labels == 0] = -100
        return Batch(tokens, labels, tokens > 0, None, None)


def words(count: int, seed: int, kind: type[Words] = Words) -> Words:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCAB, (count, LENGTH))
    tokens[np.arange(LENGTH) >= rng.integers(6, LENGTH + 1, count)[:, None]] = 0
    return kind(tokens, (tokens * (tokens <= 3)).sum(1) % CLASSES)


def make_task(kind: Kind = "classifier", train_examples: int = 50) -> Task:
    splits = {"classifier": Words, "two-tower": Pairs, "causal-lm": Text}[kind]
    return Task(
        name="words",
        kind=kind,
        train=words(train_examples, 0, splits),
        val=words(21, 1, splits),
        test=words(22, 2, splits),
        inputs="tokens",
        vocab=VOCAB,
        channels=1,
        classes=2 if kind == "two-tower" else CLASSES,
        max_length=LENGTH,
        baselines={"majority class": 0.4},
        chance_loss=float(np.log(CLASSES)),
        note="",
    )


def make_run(out: Path, *, model: dict | None = None, optim: dict | None = None, **settings: Any) -> RunConfig:
    """A tiny run; `settings` are those of TrainConfig."""
    tiny = {
        "vocab": VOCAB,
        "classes": CLASSES,
        "layers": 2,
        "d_model": 8,
        "d_ff": 8,
        "d_key": 4,
        "d_value": 8,
        "kernel_length": LENGTH,
        "branches": [3],
        "dropout": 0.1,
    }
    short = {
        "steps": 12,
        "batch_size": 8,
        "eval_every": 4,
        "save_every": 3,
        "log_every": 2,
        "chance_after": 0,
        "device": "cpu",
    }
    values = {
        "preset": "tiny",
        "out": out,
        "model": tiny | (model or {}),
        "data": {"task": "words"},
        "optim": {"lr": 3e-3, "warmup": 3} | (optim or {}),
        "train": short | settings,
    }
    return from_dict(RunConfig, values)


@contextmanager
def tiny_task(task: Task) -> Iterator[None]:
    with patch("chela.training.run.load_task", lambda config, progress: task):
        yield


def run_tiny(run: RunConfig, task: Task | None = None) -> tuple[Result, str]:
    """Train in this process; the result and what was printed."""
    out = StringIO()
    with tiny_task(task or make_task(run.model.kind)):
        result = train(run, console=Console(file=out, width=500))
    return result, out.getvalue()


def start(run: RunConfig, folder: Path, *, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
    """Train in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "settings.toml"
    save_toml(run, settings)
    return subprocess.Popen(
        [sys.executable, *launcher, __file__, str(settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("DOUBLE"):
        torch.set_default_dtype(torch.float64)
    settings = load_toml(Path(sys.argv[1]))
    try:
        with tiny_task(make_task(settings.model.kind)):
            status = train(settings).status
            os.write(1, f"status: {status}\n".encode())  # at once: other ranks write to the same pipe
    except ValueError as error:
        print(f"refused: {error}", file=sys.stderr)
        sys.exit(2)
