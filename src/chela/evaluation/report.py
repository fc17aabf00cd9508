"""`chela report`: one self-contained page on runs, grouped by configuration; the same runs give the same page."""

from collections.abc import Sequence
from pathlib import Path

import tomli_w

from chela.disk import write_whole
from chela.evaluation import curves, page
from chela.evaluation.axes import AGAINST
from chela.evaluation.charts import charts
from chela.evaluation.page import Cell
from chela.evaluation.results import by_data, metric, minutes, results
from chela.evaluation.runs import INCIDENTAL, Group, Run, command, group, key_of, read_run
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
    try:
        write_whole(out, text.encode())
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror}") from None
    return out


def render(runs: Sequence[Run]) -> str:
    """The page."""
    groups = group(runs)
    alone = runs[0] if len(runs) == 1 else None
    tasks = by_data(groups)
    names = ", ".join(dict.fromkeys(run.config.data.task for run in runs))
    title = f"{groups[0].name}, seed {alone.config.seed}" if alone else f"{len(runs)} runs on {names}"
    subtitle = (
        f"One run on the task {names}: {alone.status}"
        if alone
        else f"{_count(len(groups), 'configuration')}; result on the test split, mean ± standard deviation over seeds"
    )
    return page.page(
        title,
        subtitle,
        [
            page.figures(_headline(alone)) if alone else "",
            page.section("Results", *_results(tasks), *_remarks(runs)),
            _curves(groups, tasks),
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
    if recorded := run.last("test").get("baselines", {}):
        name, value = max(recorded.items(), key=lambda item: item[1])
        items.append((f"{100 * value:.2f} %", f"baseline: {name}"))
    items.append((f"{run.last('start').get('parameters', 0):,}", "parameters"))
    train = run.config.train
    items.append((f"{run.step:,}", f"steps in {train.minutes:g} min" if train.minutes else f"steps of {train.steps:,}"))
    items.append((minutes(run.seconds), "minutes"))
    return items


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


def _results(tasks: dict[str, list[tuple[int, Group]]]) -> list[str]:
    parts = []
    for name, members in tasks.items():
        parts.append(page.paragraph(name) if len(tasks) > 1 else "")
        parts.append(results([(curves.colour(index), g) for index, g in members]))
    return parts


def _curves(groups: Sequence[Group], tasks: dict[str, list[tuple[int, Group]]]) -> str:
    title = "Curves"
    if not curves.available():
        return page.section(title, page.paragraph("Install chela[plot] for the curves (it brings matplotlib)."))
    views: dict[str, list[tuple[str, str]]] = {against: [] for against in AGAINST}
    for name, members in tasks.items():
        prefix = f"{name}: " if len(tasks) > 1 else ""
        for against, drawn in charts(members).items():
            views[against] += [(prefix + chart.title, curves.draw(chart)) for chart in drawn]
    timed = all(g.config.train.minutes for g in groups)
    drawings = {against: page.charts(items) for against, items in views.items() if items}
    names = [(curves.colour(index), g.name) for index, g in enumerate(groups)]
    return page.section(
        title,
        page.legend(names) if len(names) > 1 else "",
        page.views("against", drawings, "minutes" if timed and "minutes" in drawings else "steps"),
    )


def _departures(groups: Sequence[Group]) -> str:
    """Every setting in which a configuration departs from the first one of its task."""
    first: dict[str, Group] = {}
    rows = []
    for g in groups:
        start = first.setdefault(g.config.data.task, g)
        lines = [line for line in differences(start.config, g.config) if key_of(line) not in INCIDENTAL]
        for number, line in enumerate(lines):
            cells = [Cell("" if number else g.name), Cell("" if number else start.name, "soft"), Cell(line)]
            rows.append(("more" if number else "", cells))
    return page.table([Cell("Configuration"), Cell("Against"), Cell("Setting")], rows) if rows else ""


def _environment(runs: Sequence[Run]) -> str:
    """A row for each fact, or one for each of its values with the runs that had it."""
    rows = []
    known = [key for key in ENVIRONMENT if any(key in run.last("start") for run in runs)]
    for key in known:
        met: dict[str, list[str]] = {}
        for run in runs:
            met.setdefault(str(run.last("start").get(key, "unknown")), []).append(run.folder.name)
        for number, (value, names) in enumerate(met.items()):
            whose = ", ".join(names) if len(met) > 1 else ""
            cells = [Cell("" if number else key, "soft"), Cell(value, "fixed"), Cell(whose, "soft")]
            rows.append(("fact more" if number else "fact", cells))
    return page.table([], rows)


def _settings(groups: Sequence[Group]) -> list[str]:
    return [page.folded(g.name, page.code(tomli_w.dumps(to_dict(g.config)).splitlines())) for g in groups]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
