"""Plots of `chela bench`: time against length and its ratio to the floor, of everybody who was timed."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chela.evaluation.curves import available, colour

Row = dict[str, object]
LENGTHS = ("B", "T", "L")
"""Axes that change along a curve; the others tell one plot from another."""
INK, GREY = "#22262b", "#8a929c"


def write(rows: Sequence[Row], table: Path) -> list[str]:
    """Plot everything that was timed at several lengths, as SVG and PNG beside its table.

    Args:
        rows: of the table, as `run_bench` returns them.
        table: the CSV file; plots take its name with op and sizes added.

    Returns:
        A line on each plot written, or on why there is none.
    """
    families: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if "T" in _axes(row):
            families[str(row["op"]), _sizes(row)].append(row)
    wanted = {key: family for key, family in families.items() if len({_axes(row)["T"] for row in family}) > 1}
    if wanted and not available():
        return ["no plots: matplotlib is not installed (install chela[plot])"]
    said = []
    for (op, sizes), family in wanted.items():
        path = table.with_name(f"{table.stem}-{op}-{sizes}.svg".replace(", ", "-").replace(" ", "-"))
        _draw(family, f"{op}, {sizes}", path)
        said.append(f"plot: {path} and .png")
    return said


def _axes(row: Row) -> dict[str, int]:
    return {word[0]: int(word[1:]) for word in str(row["shape"]).split()}


def _sizes(row: Row) -> str:
    return " ".join(f"{axis}{size}" for axis, size in _axes(row).items() if axis not in LENGTHS)


def _draw(rows: Sequence[Row], title: str, path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    passes = [*dict.fromkeys(str(row["pass"]) for row in rows)]
    names = [*dict.fromkeys(str(row["implementation"]) for row in rows)]
    style = {"svg.hashsalt": title, "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY}
    style |= {"xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": INK, "ytick.labelcolor": INK}
    with rc_context(style):
        panels = ("median", "low", "high"), ("ratio", "least", "most")
        panels = panels if all(row["floor_ms"] for row in rows) else panels[:1]
        width, height = max(4.6 * len(passes), 9.2), 1.2 + 2.6 * len(panels)
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        grid = figure.subplots(len(panels), len(passes), sharex=True, sharey="row", squeeze=False)
        for column, part in enumerate(passes):
            upper, lower = grid[0, column], grid[-1, column]
            for number, name in enumerate(names):
                curve = _curve([row for row in rows if (row["pass"], row["implementation"]) == (part, name)])
                for axes, (middle, low, high) in zip(grid[:, column], panels, strict=True):
                    ours = name.startswith("chela")
                    axes.plot(
                        curve["T"], curve[middle], label=name, color=colour(number), marker="o", markersize=3.5,
                        linewidth=2.2 if ours else 1.3, zorder=3 if ours else 2,
                    )  # fmt: skip
                    axes.fill_between(curve["T"], curve[low], curve[high], color=colour(number), alpha=0.18, lw=0)
            if len(panels) > 1:
                floor = sorted({(_axes(row)["T"], float(str(row["floor_ms"]))) for row in rows if row["pass"] == part})
                dashed = {"color": INK, "linewidth": 1, "linestyle": (0, (4, 3))}
                upper.plot(*zip(*floor, strict=True), **dashed, label="floor: a copy")
                lower.axhline(1, **dashed)
            upper.set_title(part, fontsize=10)
            lower.set_xlabel("T, tokens of a sequence")
        for axes in grid.flat:
            _dress(axes, sorted({_axes(row)["T"] for row in rows}))
        grid[0, 0].set_ylabel("ms")
        if len(panels) > 1:
            grid[1, 0].set_ylabel("times the floor")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(f"{title}, {_batch(rows)}\n{_provenance(rows[0])}", fontsize=10)
        figure.savefig(path, metadata={"Date": None})
        figure.savefig(path.with_suffix(".png"), dpi=150)


def _curve(rows: Sequence[Row]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: _axes(row)["T"]):
        median, low, high = (float(str(row[key])) for key in ("median_ms", "low_ms", "high_ms"))
        floor = float(str(row["floor_ms"] or 1))
        values = (_axes(row)["T"], median, low, high, median / floor, low / floor, high / floor)
        for name, value in zip(("T", "median", "low", "high", "ratio", "least", "most"), values, strict=True):
            found[name].append(value)
    return found


def _dress(axes: Any, lengths: list[int]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [_short(t) for t in lengths], rotation=45 if len(lengths) > 6 else 0)
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: ""))
    axes.grid(which="major", color="#dfe3e8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _short(length: int) -> str:
    """A length as people say it: 512, 16k, 1M."""
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if length % unit == 0:
            return f"{length // unit}{name}"
    return str(length)


def _batch(rows: Sequence[Row]) -> str:
    batches = {_axes(row)["B"] for row in rows}
    return f"B{max(batches)}" if len(batches) == 1 else f"B{max(batches)} to B{min(batches)} as T grows"


def _provenance(row: Row) -> str:
    kept = f"copy {float(str(row['copy_gb_per_s'])):,.0f} GB/s"
    commit, _, dirty = str(row["commit"]).partition("-")
    commit = f", commit {commit[:7]}{dirty and '-' + dirty}" if commit else ""
    return f"{row['device']}, {row['dtype']}, {kept}, torch {row['torch']}{commit}, {row['date']}"
