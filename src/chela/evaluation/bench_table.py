"""What `chela bench` prints of a suite: a table of times, and how far the time of a token goes with the length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from chela.evaluation.bench_suite import Contender, Shape, Suite
from chela.evaluation.timing import Time

PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Measured:
    """One contender at one shape."""

    contender: Contender
    shape: Shape
    times: dict[str, Time] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    """Milliseconds by pass; none where a copy's speed is not the limit."""
    error: float | None = None
    """Largest relative error of a value or gradient in the check; None for a peer."""


def table(suite: Suite, measured: Sequence[Measured]) -> Table:
    """Median times, in floors too; for ours how often they fit into the fastest peer's: above 1 won, below lost."""
    passes = PASSES if suite.backward else PASSES[:1]
    beside = any(not m.contender.impl for m in measured)  # else there is no one to compare with
    table = Table(title=suite.op, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True, min_width=22)
    for name in passes:
        table.add_column(f"{name.removeprefix('forward') or name}\nms", justify="right", min_width=9)
        if suite.floor:
            table.add_column("ms /\nfloor", justify="right", min_width=5)
        if beside:
            table.add_column("peer\n/ours", justify="right", min_width=5)
    table.add_column(f"tokens/s\n{passes[-1].removeprefix('forward')}", justify="right", min_width=11)
    for shape in {shape_text(m.shape): m.shape for m in measured}.values():
        here = [m for m in measured if m.shape == shape]
        peers = [m for m in here if not m.contender.impl]
        table.add_row(Text(shape_text(shape), style="bold"))
        for m in here:
            cells: list[str | Text] = [f"  {m.contender.name}"]
            for name in passes:
                best = min((peer.times[name].median for peer in peers), default=None)
                ratio = best / m.times[name].median if best and m.contender.impl else None
                won = Text(_ratio(ratio), style="green" if ratio >= 1 else "red") if ratio else ""
                cells += [f"{m.times[name].median:.3f}"]
                cells += [_ratio(m.times[name].median / m.floors[name])] if m.floors else []
                cells += [won] if beside else []
            table.add_row(*cells, f"{1000 * suite.tokens(shape) / m.times[passes[-1]].median:,.0f}")
    return table


def flatness(suite: Suite, measured: Sequence[Measured]) -> Iterator[str]:
    """How far the time of a token goes with the length: the slowest over the fastest, by contender and pass."""
    for name in dict.fromkeys(m.contender.name for m in measured):
        ours = [m for m in measured if m.contender.name == name]
        lengths = [m.shape["T"] for m in ours]
        for part in ours[0].times:
            each = [1e6 * m.times[part].median / suite.tokens(m.shape) for m in ours]
            yield (
                f"{name}, {part}: {min(each):,.2f} to {max(each):,.2f} ns a token from T {min(lengths):,} to "
                f"{max(lengths):,}, flat to {100 * (max(each) / min(each) - 1):.1f} %"
            )


def shape_text(shape: Shape) -> str:
    """A shape as tables have it: B64 T2048."""
    return " ".join(f"{axis}{size}" for axis, size in shape.items())


def _ratio(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"
