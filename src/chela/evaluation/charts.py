"""Which curves are drawn of runs: training loss and validation result, against steps, tokens and minutes."""

from collections.abc import Sequence
from pathlib import Path

from chela.disk import write_whole
from chela.evaluation import curves
from chela.evaluation.axes import AGAINST, Against, Scale, axis
from chela.evaluation.results import baselines, by_data, score
from chela.evaluation.runs import Group, Run, group

Members = Sequence[tuple[int, Group]]
"""Configurations that learn from the same data, with their numbers among all."""


def charts(members: Members) -> dict[Against, list[curves.Chart]]:
    """Training loss and validation result of configurations of one task, against whatever all their runs know."""
    runs = [(index, g.name, run) for index, g in members for run in g.runs if run.lines("train") or run.lines("val")]
    found = {}
    for against in AGAINST if runs else ():
        if known := axis([run for _, _, run in runs], against):
            label, scales = known
            drawn = zip(runs, scales, strict=True)
            lines = [(curves.colour(index), name, run, scale) for (index, name, run), scale in drawn]
            found[against] = _charts(lines, label, baselines([g for _, g in members]))
    return found


def write_pictures(runs: Sequence[Run], prefix: Path) -> list[Path]:
    """Write every chart of a report as a file of its own, SVG and PNG, with a legend where there are several curves.

    Args:
        runs: finished or not.
        prefix: the files are PREFIX-minutes.svg (validation against minutes), PREFIX-loss-minutes.svg (training loss)
            and so on against tokens and steps; with several tasks PREFIX-TASK-minutes.svg.

    Raises:
        ValueError: matplotlib is missing, or a file cannot be written.
    """
    if not curves.available():
        raise ValueError("pictures need matplotlib: pip install 'chela[plot]'")
    tasks, written = by_data(group(runs)), []
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        for name, members in tasks.items():
            task = "".join(c if c.isalnum() else "-" for c in name) if len(tasks) > 1 else ""
            for against, drawn in charts(members).items():
                for chart in drawn:
                    part = "loss" if chart.title.startswith("Training") else ""
                    stem = "-".join(word for word in (prefix.name, task, part, against) if word)
                    for kind in ("svg", "png"):
                        path = prefix.with_name(f"{stem}.{kind}")
                        write_whole(path, curves.picture(chart, kind))
                        written.append(path)
    except OSError as error:
        raise ValueError(f"cannot write {error.filename or prefix}: {error.strerror}") from None
    return written


def _charts(runs: Sequence[tuple[str, str, Run, Scale]], label: str, trivial: dict[str, float]) -> list[curves.Chart]:
    loss, validation, name, percent, chance = [], [], "", True, {}
    right = max(scale.at([run.step])[0] for _, _, run, scale in runs)
    for colour, whose, run, scale in runs:
        train, val = run.lines("train"), run.lines("val")
        if train:
            places = scale.at([line["step"] for line in train])
            loss.append(curves.Line(colour, places, [line["loss"] for line in train], whose))
        if val:
            name, _, form = score(val[0])
            percent = form.endswith("%")
            values = [line["accuracy"] if percent else score(line)[1] for line in val]
            validation.append(curves.Line(colour, scale.at([line["step"] for line in val]), values, whose))
        if "chance_loss" in run.last("start"):
            chance = {"chance": run.last("start")["chance_loss"]}
    drawn = [curves.Chart("Training loss (nats)", loss, right, chance, label)] if loss else []
    if validation:
        levels = trivial if percent else {}
        drawn.append(curves.Chart(f"Validation {name}", validation, right, levels, label, percent))
    return drawn
