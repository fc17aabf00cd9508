"""What curves are drawn against: steps, the tokens read in them, or the minutes that they took."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from chela.config import RunConfig
from chela.evaluation.runs import Run

Against = Literal["steps", "tokens", "minutes"]
AGAINST: tuple[Against, ...] = get_args(Against)


@dataclass(frozen=True)
class Scale:
    """A quantity that grows with the steps of a run, known at some of them."""

    steps: list[int]
    amounts: list[float]

    def at(self, steps: Sequence[int]) -> list[float]:
        """The quantity at steps: as recorded, in even parts between, the last one known beyond."""
        return np.interp(steps, self.steps, self.amounts).tolist()


def axis(runs: Sequence[Run], against: Against) -> tuple[str, list[Scale]] | None:
    """An axis that all of some runs can be drawn against: its label with the unit, and the scale of each run.

    Tokens are those that the journal counts; without a count, those of the windows of a language model. Minutes are
    of training, as `train.minutes` counts them (without validation and the compiling first step of each start) where
    every run knows them. Older journals do not hold them; they come from the tokens and from the rates of the
    training lines, the line after a start being taken at the rate of the next one. Where that fails too, minutes are
    those of the clock at each validation, everything included.

    Returns:
        None where a run has neither count.
    """
    if against == "steps":
        return "step", [Scale([0, run.step], [0.0, float(run.step)]) for run in runs]
    if against == "tokens":
        return _shared(runs, "tokens (millions)", tokens, 1e6)
    return _shared(runs, "minutes of training", trained, 60) or _shared(
        runs, "minutes, validation and compiling included", elapsed, 60
    )


def tokens(run: Run) -> Scale | None:
    """Tokens read, as counted or as follows from the settings."""
    each = _tokens_a_step(run.config)
    return _recorded(run, "train", "tokens") or (Scale([0, run.step], [0.0, float(each * run.step)]) if each else None)


def trained(run: Run) -> Scale | None:
    """Seconds spent on updates, as recorded or as follows from tokens and their rates."""
    return _recorded(run, "val", "trained_seconds") or _from_rates(run)


def elapsed(run: Run) -> Scale | None:
    """Seconds since the run began, over all starts."""
    return _recorded(run, "val", "seconds")


def _shared(
    runs: Sequence[Run], label: str, measure: Callable[[Run], Scale | None], unit: float
) -> tuple[str, list[Scale]] | None:
    found = [measure(run) for run in runs]
    scales = [Scale(scale.steps, [amount / unit for amount in scale.amounts]) for scale in found if scale]
    return (label, scales) if scales and len(scales) == len(found) else None


def _recorded(run: Run, always: str, key: str) -> Scale | None:
    """A quantity from all lines that have it; None unless those of the kind `always` do."""
    known = {line["step"]: line[key] for line in run.journal if line["kind"] in ("train", "val") and key in line}
    if not known or any(key not in line for line in run.lines(always)):
        return None
    return Scale([0, *known], [0.0, *known.values()])


def _from_rates(run: Run) -> Scale | None:
    lines = [line for line in run.journal if line["kind"] in ("start", "train")]
    read, train = tokens(run), run.lines("train")
    if read is None or not train or any("tokens_per_s" not in line for line in train):
        return None
    steps, amounts = [0], [0.0]
    for number, (before, line) in enumerate(pairwise(lines)):
        if line["kind"] == "start":
            continue
        following = lines[number + 2] if number + 2 < len(lines) else line
        rated = following if before["kind"] == "start" and following["kind"] == "train" else line
        earlier, now = read.at([steps[-1], line["step"]])
        steps.append(line["step"])
        amounts.append(amounts[-1] + (now - earlier) / rated["tokens_per_s"])
    return Scale(steps, amounts)


def _tokens_a_step(config: RunConfig) -> int:
    """Tokens of a step where the settings fix them; else 0."""
    fixed = config.model.kind == "causal-lm" and not config.data.packed
    return config.train.batch_size * config.data.max_length if fixed else 0
