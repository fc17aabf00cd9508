"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from chela.training import distributed

QUIET_SECONDS = 2.0  # between two plain lines of training


class Display:
    """Shows rank 0's progress; the other ranks show nothing.

    Args:
        console: where to write; standard output by default.
        steps: optimiser steps of the whole run, as far as is known.
    """

    def __init__(self, console: Console | None, steps: int) -> None:
        self._console = console or Console()
        self.steps = steps  # with `train.minutes` it moves
        self._last = -QUIET_SECONDS
        self._bar: Progress | None = None

    @contextmanager
    def live(self, step: int) -> Iterator[None]:
        """Show the bar from `step` on, where there is a terminal."""
        if not distributed.is_main() or not self._console.is_terminal:
            yield
            return
        columns = (
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=30),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as bar:
            self._bar, self._task = bar, bar.add_task("", total=self.steps, completed=step)
            yield
        self._bar = None

    def step(self, step: int) -> None:
        """A step is done."""
        if self._bar:
            self._bar.update(self._task, completed=step, total=self.steps)

    def train(self, step: int, loss: float, accuracy: float, tokens_per_s: float) -> None:
        """Means since the last line of the journal."""
        words = f"loss {loss:.4f}, accuracy {100 * accuracy:.1f} %, {tokens_per_s:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, description=words)
        elif time.monotonic() - self._last >= QUIET_SECONDS:
            self._last = time.monotonic()
            self.say(f"step {step:,}/{self.steps:,}: {words}")

    def say(self, text: str) -> None:
        """Print a line."""
        if distributed.is_main():
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
