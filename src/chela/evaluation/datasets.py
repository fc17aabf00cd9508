"""`chela data`: what a task consists of, and what lies in a data folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from chela.config import DataConfig
from chela.data import Task, load_task

SHOWN = 16
"""Values of an example that are shown."""


def describe_task(name: str, root: Path, progress: Callable[[str], None] | None = None) -> str:
    """Prepare a task's data and describe them in lines for a person.

    Raises:
        ValueError: an unknown task, or data that are missing or malformed; says where to get them.
    """
    task = load_task(DataConfig(task=name, root=root), progress=progress)
    sizes = f"{len(task.train):,} training, {len(task.val):,} validation, {len(task.test):,} test examples"
    inputs = f"tokens 0..{task.vocab - 1}" if task.inputs == "tokens" else f"{task.channels} real value(s) a step"
    lines = [f"{task.name}: {task.note}" if task.note else task.name, f"  {sizes}"]
    lines.append(f"  up to {task.max_length:,} steps of {inputs}")
    if task.classes:
        lines.append(f"  {task.classes} classes")
    lines += [f"  baseline, {what}: {100 * value:.2f} % on the test split" for what, value in task.baselines.items()]
    return "\n".join([*lines, f"  {_example(task)}"])


def inventory(root: Path) -> list[tuple[str, str]]:
    """Rows (name, finding) on a data folder; nothing is read or generated."""
    folder = root.expanduser()
    if not folder.is_dir():
        return [("root", f"{root} does not exist yet")]
    rows = [("root", str(root))]
    for place in (folder, folder / "prepared"):
        names = sorted(p.name + "/" * p.is_dir() for p in place.iterdir()) if place.is_dir() else []
        names = [name for name in names if name != "prepared/" and not name.endswith(".tmp/")]
        rows.append(("given" if place == folder else "prepared", ", ".join(names) or "nothing"))
    return rows


def _example(task: Task) -> str:
    batch = task.train.batch(np.array([0]))
    values = batch.inputs[0].flatten().tolist()
    shown = " ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in values[:SHOWN])
    label = f", label {int(batch.labels[0])}" if task.classes else ""
    return f"first training example, {len(batch.inputs[0]):,} steps{label}: {shown}{' ...' * (len(values) > SHOWN)}"
