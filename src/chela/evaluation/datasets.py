"""`chela data`: what a task consists of, and what lies in a data folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from chela.config import DataConfig
from chela.data import PackedSplit, PairSplit, RaggedReal, RaggedSplit, StreamSplit, Task, load_task
from chela.data.token_files import TokenFiles

SHOWN, SHOWN_TEXT, LISTED = 16, 70, 10
"""Values of an example that are shown, characters of a text, and classes whose shares are."""


def describe_task(config: DataConfig, progress: Callable[[str], None] | None = None) -> str:
    """Prepare a task's data and describe them in lines for a person.

    Raises:
        ValueError: an unknown task, or data that are missing or malformed; says where to get them.
    """
    task = load_task(config, progress=progress)
    sizes = f"{len(task.train):,} training, {len(task.val):,} validation, {len(task.test):,} test examples"
    inputs = f"a vocabulary of {task.vocab}" if task.inputs == "tokens" else f"{task.channels} real value(s)"
    lines = [f"{task.name}: {task.note}" if task.note else task.name, sizes, f"{_lengths(task)} of {inputs}"]
    if task.classes:
        lines.append(_classes(task))
    lines += _texts(task, progress)
    lines += [f"baseline, {what}: {100 * value:.2f} % on the test split" for what, value in task.baselines.items()]
    return "\n  ".join([*lines, *_example(task)])


def inventory(root: Path) -> list[tuple[str, str]]:
    """Rows (name, finding) on a data folder; nothing is read or generated."""
    folder = root.expanduser()
    if not folder.is_dir():
        return [("root", f"{root} is a file, not a folder" if folder.exists() else f"{root} does not exist yet")]
    rows = [("root", str(root))]
    for place in (folder, folder / "prepared"):
        names = sorted(p.name + "/" * p.is_dir() for p in place.iterdir()) if place.is_dir() else []
        names = [name for name in names if name != "prepared/" and not name.endswith(".tmp/")]
        rows.append(("given" if place == folder else "prepared", ", ".join(names) or "nothing"))
    return rows


def _lengths(task: Task) -> str:
    if not isinstance(task.train, RaggedSplit | RaggedReal | PairSplit):
        return f"{task.max_length:,} steps"
    lengths = task.train.lengths()
    side = " on the longer side" if task.kind == "two-tower" else ""
    return f"{lengths.min():,} to {lengths.max():,} steps{side} (median {np.median(lengths):,.0f})"


def _texts(task: Task, progress: Callable[[str], None] | None) -> list[str]:
    """What the parts of a language model's text hold; checks their token files."""
    lines = []
    for name, part in (("training", task.train), ("validation", task.val), ("test", task.test)):
        if not isinstance(part, StreamSplit | PackedSplit) or part.text is None:
            continue
        if isinstance(part.tokens, TokenFiles):
            if progress:
                progress(f"{task.name}: checking {part.tokens.folder}")
            part.tokens.verify()
        text = part.text
        words = f", {text.words:,} words" if text.words else ""
        lines.append(
            f"{name}: {text.bytes:,} bytes{words}, {text.documents:,} documents, {text.tokens:,} tokens "
            f"({text.bytes / text.tokens:.2f} bytes each)"
        )
    return lines


def _classes(task: Task) -> str:
    """Share of every class in training, or of the rarest and the most frequent where there are many."""
    labels: np.ndarray = task.train.labels  # pyrefly: ignore  # every split with classes has them
    share = 100 * np.bincount(labels, minlength=task.classes) / len(labels)
    named = [f"{_name(task, label)} {share[label]:.1f} %" for label in range(task.classes)]
    if task.classes > LISTED:
        named = [f"from {named[int(share.argmin())]} to {named[int(share.argmax())]}"]
    return f"{task.classes} classes in training: {', '.join(named)}"


def _name(task: Task, label: int) -> str:
    return task.names[label] if task.names else str(label)


def _example(task: Task) -> list[str]:
    batch = task.train.batch(np.array([0]))
    label = f", labelled {_name(task, int(batch.labels[0]))}" if task.classes else ""
    lines = [f"first training example, {len(batch.inputs[0]):,} steps{label}: {_shown(batch.inputs[0], task)}"]
    if batch.second is not None:
        lines.append(f"beside it, {len(batch.second[0]):,} steps: {_shown(batch.second[0], task)}")
    return lines


def _shown(inputs: Tensor, task: Task) -> str:
    if task.decode:
        text = task.decode(inputs.numpy())
        return repr(text[:SHOWN_TEXT]) + " ..." * (len(text) > SHOWN_TEXT)
    values = inputs.flatten().tolist()
    shown = " ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in values[:SHOWN])
    return shown + " ..." * (len(values) > SHOWN)
