"""Where tables are printed: a terminal as wide as it is, a file or a pipe with room."""

from rich.console import Console

WIDE = 120
"""Columns of text where there is no terminal to ask."""


def console_for_tables(console: Console | None = None) -> Console:
    """Standard output, or the console given, at least `WIDE` where it is no terminal."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    return console
