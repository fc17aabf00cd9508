"""Curves as inline SVG, drawn by matplotlib when it is installed; ink and rules take the page's colours."""

import importlib.util
import io
import re
from dataclasses import dataclass
from html import escape

INK, RULE = "#010203", "#040506"  # stand-ins, replaced by the page's own colours below
COLOURS = ("#2f7ed8", "#e8743b", "#19a979", "#945ecf", "#d64b6a", "#13a4b4", "#b08d2c", "#6c8893")


@dataclass(frozen=True)
class Line:
    """One run's curve; runs of one configuration share a colour."""

    colour: str
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Chart:
    """Several curves over optimiser steps."""

    title: str
    lines: list[Line]
    steps: int
    """Right end of the axis."""
    levels: dict[str, float]
    """Horizontal lines to compare with: baselines, chance."""
    percent: bool = False


def colour(number: int) -> str:
    """The colour of a configuration."""
    return COLOURS[number % len(COLOURS)]


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(chart: Chart) -> str:
    """The chart as an SVG element; the same chart gives the same text."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": chart.title,
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": RULE,
        "xtick.color": RULE,
        "ytick.color": RULE,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "grid.color": RULE,
    }
    with rc_context(style):
        figure = Figure(figsize=(5.2, 3.1), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for line in chart.lines:
            marker = "o" if len(line.steps) == 1 else None
            axes.plot(line.steps, line.values, color=line.colour, linewidth=1.6, alpha=0.9, marker=marker)
        for name, level in chart.levels.items():
            axes.axhline(level, color=RULE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                name, (1, level), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points",
                ha="right", va="bottom", fontsize=7.5,
            )  # fmt: skip
        axes.set_xlim(0, max(chart.steps, 1))
        axes.set_xlabel("step")
        axes.grid(axis="y", linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{int(x):,}"))
        if chart.percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _embed(buffer.getvalue(), chart.title)


def _embed(svg: str, title: str) -> str:
    """A file's SVG made fit for a page: no fixed size, no ids but those referred to, the page's colours."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, body = svg.split(">", 1)
    head = re.sub(r' (width|height|xmlns:xlink|version)="[^"]*"', "", head)
    used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", body))
    used = {name for pair in used for name in pair}
    body = re.sub(r' id="([^"]*)"', lambda match: match.group() if match.group(1) in used else "", body)
    body = body.replace("xlink:href", "href")
    return f'{head} role="img" aria-label="{escape(title)}">{body}'.replace(INK, "currentColor").replace(
        RULE, "var(--rule)"
    )
