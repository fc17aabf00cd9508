"""`chela eval`: the weights of a finished or running run on a split of its task, by the same code as in training."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from chela.data import load_task
from chela.evaluation.runs import load_run, place
from chela.training import metrics
from chela.training.checks import check_run
from chela.training.device import compute_type
from chela.training.folder import check_tokenizer


@dataclass(frozen=True)
class Evaluated:
    """The result of an evaluation and what to read it against."""

    task: str
    split: str
    examples: int
    result: dict[str, float]
    """loss, accuracy, count, and for a language model perplexity, bits_per_byte and word_perplexity."""
    baselines: dict[str, float]
    """Accuracies that need no model, computed from the test split."""
    note: str
    """What a reader must know of the split; empty if nothing."""

    def describe(self) -> str:
        """The result in lines for a person."""
        lines = [f"{self.task}, {self.split} split, {self.examples:,} examples: {metrics.text(self.result)}"]
        if self.split == "test":
            lines += [f"  baseline, {name}: {100 * value:.2f} %" for name, value in self.baselines.items()]
        return "\n".join([*lines, *([f"  {self.note}"] if self.note else [])])


def evaluate_run(
    folder: Path,
    split: Literal["test", "val", "train"] = "test",
    *,
    root: Path | None = None,
    batch_size: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Evaluated:
    """Evaluate a run's best weights.

    Args:
        folder: the run's.
        split: which part of the data, the whole of it.
        root: folder of the data, if not the one the run names.
        batch_size: examples a batch; 0 takes the run's.
        device: where to compute.

    Raises:
        ValueError: not the folder of a run, files truncated or edited, data missing.
    """
    if batch_size < 0:
        raise ValueError(f"batch-size must not be negative, got {batch_size}")
    where = place(device)
    run, model = load_run(folder, where)
    task = load_task(replace(run.data, root=root) if root else run.data)
    check_run(replace(run, model=replace(run.model, merged=False)), task)
    check_tokenizer(folder, task.tokenizer)
    part = getattr(task, split)
    result = metrics.evaluate(
        model,
        part,
        batch_size=batch_size or run.train.eval_batch_size or run.train.batch_size,
        device=where,
        dtype=compute_type(run.train.dtype, where),
        kind=task.kind,
    )
    return Evaluated(task.name, split, len(part), result, task.baselines, task.note)
