"""The numbers of a report: which one counts, its mean over seeds, and the table of them."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chela.config import DataConfig
from chela.evaluation import page
from chela.evaluation.page import Cell
from chela.evaluation.runs import Group, Run, group
from chela.evaluation.terminal import console_for_tables
from chela.record import differences

NARROW = ("Configuration", "Runs", "Best validation", "Steps", "Minutes")
"""Columns that stand beside the test's result in a terminal too."""
FACTS = ("Steps", "Minutes", "Tokens/s", "Memory")
"""What a run took."""


def metric(result: dict[str, Any]) -> tuple[str, str]:
    """Name and text of the number that counts in a result."""
    name, value, form = score(result)
    return name, form.format(value)


def score(result: dict[str, Any]) -> tuple[str, float, str]:
    """Name, value and format of the number that counts in a result."""
    if "bits_per_byte" in result:
        return "bits per byte", result["bits_per_byte"], "{:.4f}"
    if "perplexity" in result:
        return "perplexity", result["perplexity"], "{:.2f}"
    return "accuracy", 100 * result["accuracy"], "{:.2f} %"


def by_data(groups: Sequence[Group]) -> dict[str, list[tuple[int, Group]]]:
    """The configurations that learn from the same data, by a name for these, with their number among all."""
    together: dict[str, list[tuple[int, Group]]] = {}
    for index, g in enumerate(groups):
        changed = differences(DataConfig(task=g.config.data.task), replace(g.config.data, root=DataConfig().root))
        limits = [line.replace(" was 0, now", "") for line in changed]
        together.setdefault(", ".join([g.config.data.task, *limits]), []).append((index, g))
    return together


def baselines(groups: Sequence[Group]) -> dict[str, float]:
    """Test accuracies of trivial answers, as the runs recorded them."""
    return {k: v for g in groups for run in g.runs for k, v in run.last("test").get("baselines", {}).items()}


def results(groups: Sequence[tuple[str, Group]]) -> str:
    """The table of configurations of one task, each with its colour, their runs, and the task's baselines."""
    return page.table(*_table(groups))


def show(runs: Sequence[Run], console: Console | None = None) -> None:
    """Print the same table for every task of some runs."""
    console = console_for_tables(console)
    together: dict[str, list[tuple[str, Group]]] = {}
    for g in group(runs):
        together.setdefault(g.config.data.task, []).append(("", g))
    for groups in together.values():
        head, rows = _table(groups)
        places = [place for place, cell in enumerate(head) if cell.text in NARROW or cell.text.startswith("Test")]
        longest = max(len(word) for _, cells in rows for word in cells[0].text.split())
        printed = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
        for place in places:
            first, right = place == 0, "number" in head[place].look
            printed.add_column(
                head[place].text, justify="right" if right else "left", no_wrap=not first, min_width=first * longest
            )
        for look, cells in rows:
            printed.add_row(*(Text("  " * (look == "part" and not place) + cells[place].text) for place in places))
        console.print(printed, "", crop=False)


def _table(groups: Sequence[tuple[str, Group]]) -> tuple[list[Cell], list[tuple[str, list[Cell]]]]:
    names = {score(run.best)[0] for _, g in groups for run in g.runs if run.best}
    head = [Cell("Configuration"), Cell("Runs"), Cell(" ".join(["Test", *names]), "number")]
    head += [Cell(name, "number") for name in ("Best validation", "Parameters", *FACTS)] + [Cell("Device")]
    rows = []
    for colour, g in groups:
        rows.append(("group", _group_row(g, colour)))
        if len(g.runs) > 1:
            rows += [("part", _run_row(run)) for run in g.runs]
    for name, value in baselines([g for _, g in groups]).items():
        cells = [Cell(name, "soft"), Cell("baseline", "soft"), Cell(f"{100 * value:.2f} %", "number soft")]
        rows.append(("", cells + [Cell("")] * (len(head) - len(cells))))
    kept = [
        n for n, cell in enumerate(head) if cell.text not in FACTS or any(row[n].text.strip("–") for _, row in rows)
    ]
    return [head[n] for n in kept], [(look, [row[n] for n in kept]) for look, row in rows]


def _group_row(g: Group, colour: str) -> list[Cell]:
    done = [run for run in g.runs if run.status == "done"]
    others = ", ".join(
        f"{count} {status}"
        for status in ("failed", "stopped", "unfinished")
        if (count := sum(run.status == status for run in g.runs))
    )
    state = f"{len(done)} of {len(g.runs)} done" + (f", {others}" if others else "")
    alone = g.runs[0] if len(g.runs) == 1 else None
    name = f"{g.name}, seed {alone.config.seed}" if alone else g.name
    return [
        Cell(name, swatch=colour),
        Cell(alone.status if alone else state, _look(g.runs)),
        Cell(_mean([(run.config.seed, run.test) for run in g.runs if run.test]), "number"),
        Cell(_mean([(run.config.seed, run.best) for run in g.runs if run.best]), "number"),
        *_facts(g.runs),
    ]


def _run_row(run: Run) -> list[Cell]:
    return [
        Cell(f"seed {run.config.seed}"),
        Cell(run.status, _look([run])),
        Cell(metric(run.test)[1] if run.test else "–", "number"),
        Cell(metric(run.best)[1] if run.best else "–", "number"),
        *_facts([run]),
    ]


def _facts(runs: Sequence[Run]) -> list[Cell]:
    """Parameters, steps, minutes, speed, memory and device: means, the most memory, and steps from least to most."""
    start = [run.last("start") for run in runs]
    steps = sorted({run.step for run in runs})
    devices = dict.fromkeys(_device(line) for line in start)
    rates = [run.tokens_per_s for run in runs if run.tokens_per_s]
    peaks = [run.peak_gib for run in runs if run.peak_gib]
    return [
        Cell(f"{start[0].get('parameters', 0):,}", "number soft"),
        Cell("–".join(f"{step:,}" for step in (steps if len(steps) == 1 else (steps[0], steps[-1]))), "number soft"),
        Cell(minutes(statistics.mean(run.seconds for run in runs)), "number soft"),
        Cell(f"{statistics.mean(rates):,.0f}" if rates else "–", "number soft"),
        Cell(f"{max(peaks):.1f} GiB" if peaks else "–", "number soft"),
        Cell(", ".join(devices), "soft"),
    ]


def _device(start: dict[str, Any]) -> str:
    count = start.get("processes", 1)
    return (f"{count} x " if count > 1 else "") + str(start.get("device", "unknown"))


def _look(runs: Sequence[Run]) -> str:
    status = {run.status for run in runs}
    return "fixed " + ("bad" if "failed" in status else "good" if status == {"done"} else "soft")


def _mean(results: Sequence[tuple[int, dict[str, Any]]]) -> str:
    """Mean and deviation over seeds; several runs of one seed count once, with their mean."""
    if not results:
        return "–"
    by_seed: dict[int, list[float]] = {}
    for seed, result in results:
        by_seed.setdefault(seed, []).append(score(result)[1])
    values, form = [statistics.mean(runs) for runs in by_seed.values()], score(results[0][1])[2]
    shown = form.format(statistics.mean(values))
    if len(values) == 1:
        return shown
    deviation = form.removesuffix(" %").format(statistics.stdev(values))
    return f"{shown.removesuffix(' %')} ± {deviation}" + (" %" if shown.endswith("%") else "")


def minutes(seconds: float) -> str:
    """Seconds as minutes."""
    return f"{seconds / 60:.1f}"
