"""Curves drawn by matplotlib, when it is installed: as inline SVG in the page's colours, or as files of their own."""

import importlib.util
import io
import re
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, RULE = "#010203", "#040506"  # stand-ins, replaced by the page's own colours below
PRINT_INK, PRINT_RULE = "#1c2024", "#c9ced2"  # of a file of its own, on white
COLOURS = ("#2f7ed8", "#e8743b", "#19a979", "#945ecf", "#d64b6a", "#13a4b4", "#b08d2c", "#6c8893")


@dataclass(frozen=True)
class Line:
    """One run's curve; runs of one configuration share a colour."""

    colour: str
    places: list[float]
    values: list[float]
    name: str = ""
    """Of the configuration."""


@dataclass(frozen=True)
class Chart:
    """Several curves over steps, tokens or minutes."""

    title: str
    lines: list[Line]
    right: float
    """Right end of the axis."""
    levels: dict[str, float]
    """Horizontal lines to compare with: baselines, chance."""
    along: str = "step"
    """What the axis below counts, with the unit."""
    percent: bool = False


def colour(number: int) -> str:
    """The colour of a configuration."""
    return COLOURS[number % len(COLOURS)]


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(chart: Chart) -> str:
    """The chart as an SVG element; the same chart gives the same text."""
    return _embed(_save(chart, INK, RULE, "svg", transparent=True).decode(), chart.title)


def picture(chart: Chart, kind: Literal["svg", "png"]) -> bytes:
    """The chart as a file that stands alone: on white, with its title and a legend of the configurations."""
    return _save(chart, PRINT_INK, PRINT_RULE, kind, alone=True)


def _save(
    chart: Chart, ink: str, rule: str, kind: Literal["svg", "png"], transparent: bool = False, alone: bool = False
) -> bytes:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"{chart.title}, {chart.along}",
        "font.size": 9,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": rule,
        "xtick.color": rule,
        "ytick.color": rule,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "grid.color": rule,
    }
    with rc_context(style):
        figure = Figure(figsize=(6.4, 3.8) if alone else (5.2, 3.1), layout="constrained")
        (FigureCanvasSVG if kind == "svg" else FigureCanvasAgg)(figure)
        _plot(figure, chart, rule, alone)
        buffer = io.BytesIO()
        facts = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=150, transparent=transparent, metadata=facts)
    return buffer.getvalue()


def _plot(figure: "Figure", chart: Chart, rule: str, alone: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes = figure.add_subplot()
    named = {}
    for line in chart.lines:
        marker = "o" if (alone and len(line.places) <= 20) or len(line.places) == 1 else None
        (named[line.name],) = axes.plot(
            line.places, line.values, color=line.colour, linewidth=1.6, alpha=0.9, marker=marker, markersize=4,
            clip_on=marker is None,
        )  # fmt: skip
    for name, level in chart.levels.items():
        axes.axhline(level, color=rule, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            name, (1, level), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points",
            ha="right", va="bottom", fontsize=7.5,
        )  # fmt: skip
    if alone:
        axes.set_title(chart.title, loc="left", fontsize=10)
        if len(named) > 1:
            figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False)
    axes.set_xlim(0, (chart.right or 1) * (1.02 if alone else 1))
    axes.set_xlabel(chart.along)
    axes.grid(axis="y", linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=chart.along == "step"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
    if chart.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))


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
