"""`chela report`: one self-contained page on runs, grouped by configuration; the same runs give the same page."""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from chela.evaluation import curves, page
from chela.evaluation.page import Cell
from chela.evaluation.runs import Group, Run, command, group, read_run
from chela.record import differences, to_dict

ENVIRONMENT = ("device", "dtype", "processes", "threads", "chela", "torch", "python", "system", "commit")


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write the report on one or several runs.

    Args:
        folders: folders of runs, finished or not.
        out: the page to write.

    Raises:
        ValueError: no folder, one that is no run's, or a place that cannot be written.
    """
    if not folders:
        raise ValueError("name at least one run: chela report runs/digits-seed0")
    text = render([read_run(folder) for folder in folders])
    aside = out.with_name(out.name + ".tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, out)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror}") from None
    return out


def render(runs: Sequence[Run]) -> str:
    """The page."""
    groups = group(runs)
    alone = runs[0] if len(runs) == 1 else None
    tasks = ", ".join(dict.fromkeys(run.config.data.task for run in runs))
    title = f"{groups[0].name}, seed {alone.config.seed}" if alone else f"{len(runs)} runs on {tasks}"
    subtitle = (
        f"One run on the task {tasks}: {alone.status}"
        if alone
        else f"{_count(len(groups), 'configuration')}; accuracy on the test split, mean ± standard deviation over seeds"
    )
    return page.page(
        title,
        subtitle,
        [
            page.figures(_headline(alone)) if alone else "",
            page.section("Results", _results(groups), *_remarks(runs)),
            _curves(groups),
            page.section("What differs", _departures(groups)),
            page.section("Environment", _environment(runs)),
            page.section("Commands", page.code([command(run.config) for g in groups for run in g.runs])),
            page.section("Settings", *_settings(groups)),
        ],
    )


def _headline(run: Run) -> list[tuple[str, str]]:
    result = run.test or run.best
    items = []
    if result:
        name, shown = metric(result)
        items.append((shown, f"test {name}" if run.test else f"best validation {name} so far"))
    baselines = run.last("test").get("baselines", {})
    if baselines:
        name, value = max(baselines.items(), key=lambda item: item[1])
        items.append((f"{100 * value:.2f} %", f"baseline: {name}"))
    items.append((f"{run.last('start').get('parameters', 0):,}", "parameters"))
    items.append((f"{run.step:,}", f"steps of {run.config.train.steps:,}"))
    items.append((_minutes(run.seconds), "minutes"))
    return items


def metric(result: dict[str, Any]) -> tuple[str, str]:
    """Name and text of the number that counts in a result."""
    name, value, form = _score(result)
    return name, form.format(value)


def _score(result: dict[str, Any]) -> tuple[str, float, str]:
    if "bits_per_byte" in result:
        return "bits per byte", result["bits_per_byte"], "{:.4f}"
    if "perplexity" in result:
        return "perplexity", result["perplexity"], "{:.2f}"
    return "accuracy", 100 * result["accuracy"], "{:.2f} %"


def _results(groups: Sequence[Group]) -> str:
    names = {_score(run.best)[0] for g in groups for run in g.runs if run.best}
    metrics = names.pop() if len(names) == 1 else "result"
    head = [Cell("Configuration"), Cell("Runs"), Cell(f"Test {metrics}", "number"), Cell("Best validation", "number")]
    head += [Cell(name, "number") for name in ("Parameters", "Steps", "Minutes")] + [Cell("Device")]
    rows = []
    for task in dict.fromkeys(g.config.data.task for g in groups):
        here = [(i, g) for i, g in enumerate(groups) if g.config.data.task == task]
        for index, g in here:
            rows.append(("group", _group_row(g, curves.COLOURS[index % len(curves.COLOURS)])))
            if len(g.runs) > 1:
                rows += [("part", _run_row(run)) for run in g.runs]
        baselines = {k: v for _, g in here for run in g.runs for k, v in run.last("test").get("baselines", {}).items()}
        for name, value in baselines.items():
            cells = [Cell(name, "soft"), Cell("baseline", "soft"), Cell(f"{100 * value:.2f} %", "number soft")]
            rows.append(("", cells + [Cell("")] * (len(head) - len(cells))))
    return page.table(head, rows)


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
        Cell(_mean([run.test for run in g.runs if run.test]), "number"),
        Cell(_mean([run.best for run in g.runs if run.best]), "number"),
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
    """Parameters, steps, minutes and device; a mean of the minutes, and ranges where runs differ."""
    start = [run.last("start") for run in runs]
    steps = sorted({run.step for run in runs})
    devices = dict.fromkeys(_device(line) for line in start)
    return [
        Cell(f"{start[0].get('parameters', 0):,}", "number soft"),
        Cell("–".join(f"{step:,}" for step in (steps if len(steps) == 1 else (steps[0], steps[-1]))), "number soft"),
        Cell(_minutes(statistics.mean(run.seconds for run in runs)), "number soft"),
        Cell(", ".join(devices), "soft"),
    ]


def _device(start: dict[str, Any]) -> str:
    count = start.get("processes", 1)
    return (f"{count} x " if count > 1 else "") + str(start.get("device", "unknown"))


def _look(runs: Sequence[Run]) -> str:
    status = {run.status for run in runs}
    return "bad" if "failed" in status else "good" if status == {"done"} else "soft"


def _mean(results: Sequence[dict[str, Any]]) -> str:
    if not results:
        return "–"
    values, form = [_score(result)[1] for result in results], _score(results[0])[2]
    shown = form.format(statistics.mean(values))
    if len(values) == 1:
        return shown
    deviation = form.removesuffix(" %").format(statistics.stdev(values))
    return f"{shown.removesuffix(' %')} ± {deviation}" + (" %" if shown.endswith("%") else "")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


def _remarks(runs: Sequence[Run]) -> list[str]:
    """What went wrong, and what a reader must know of the data."""
    lines = []
    for run in runs:
        end = run.last("end")
        where = f"{run.config.preset}, seed {run.config.seed}"
        if run.status == "failed":
            lines.append(f"{where} failed at step {run.step:,}: {end.get('message', '')}")
        lines += [f"{where}, step {line['step']:,}: {line['message']}" for line in run.lines("warning")]
    notes = dict.fromkeys(
        f"{run.config.data.task}: {note}" for run in runs if (note := run.last("start").get("note", ""))
    )
    return [page.paragraph(text, "soft") for text in [*notes, *lines]]


def _curves(groups: Sequence[Group]) -> str:
    title = "Curves"
    if not curves.available():
        return page.section(title, page.paragraph("Install chela[plot] for the curves (it brings matplotlib)."))
    drawings = []
    tasks = list(dict.fromkeys(g.config.data.task for g in groups))
    for task in tasks:
        drawn = _charts([(i, g) for i, g in enumerate(groups) if g.config.data.task == task])
        drawings += [(f"{task}: {c.title}" if len(tasks) > 1 else c.title, curves.draw(c)) for c in drawn]
    names = [(curves.COLOURS[i % len(curves.COLOURS)], g.name) for i, g in enumerate(groups)]
    return page.section(title, page.legend(names) if len(names) > 1 else "", page.charts(drawings))


def _charts(groups: Sequence[tuple[int, Group]]) -> list[curves.Chart]:
    loss, validation, name, percent = [], [], "accuracy", True
    chance, baselines = {}, {}
    for index, g in groups:
        for run in g.runs:
            train, val = run.lines("train"), run.lines("val")
            if train:
                loss.append(curves.Line(index, [line["step"] for line in train], [line["loss"] for line in train]))
            if val:
                name, _, form = _score(val[0])
                percent = form.endswith("%")
                values = [line["accuracy"] if percent else _score(line)[1] for line in val]
                validation.append(curves.Line(index, [line["step"] for line in val], values))
            if "chance_loss" in run.last("start"):
                chance = {"chance": run.last("start")["chance_loss"]}
            baselines |= run.last("test").get("baselines", {})
    steps = max(run.step for _, g in groups for run in g.runs)
    drawn = [curves.Chart("Training loss (nats)", loss, steps, chance)] if loss else []
    if validation:
        drawn.append(curves.Chart(f"Validation {name}", validation, steps, baselines if percent else {}, percent))
    return drawn


def _departures(groups: Sequence[Group]) -> str:
    if len(groups) < 2:
        return ""
    first = groups[0]
    rows = []
    for g in groups[1:]:
        lines = [line for line in differences(first.config, g.config) if line.split(" was ")[0] not in ("seed", "out")]
        rows += [("", [Cell(g.name if number == 0 else ""), Cell(line)]) for number, line in enumerate(lines)]
    return page.table([Cell("Configuration"), Cell(f"against {first.name}")], rows)


def _environment(runs: Sequence[Run]) -> str:
    """One column for each environment that was met."""
    met: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        start = run.last("start")
        met.setdefault(tuple(str(start.get(key, "–")) for key in ENVIRONMENT), []).append(run)
    head = [Cell("")] + [
        Cell("" if len(met) == 1 else ", ".join(f"{run.config.preset} seed {run.config.seed}" for run in members))
        for members in met.values()
    ]
    rows = [("", [Cell(key, "soft"), *(Cell(values[i]) for values in met)]) for i, key in enumerate(ENVIRONMENT)]
    return page.table(head, rows)


def _settings(groups: Sequence[Group]) -> list[str]:
    return [page.folded(g.name, page.code(tomli_w.dumps(to_dict(g.config)).splitlines())) for g in groups]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
