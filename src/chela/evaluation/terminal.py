"""Where tables are printed: a terminal as wide as it is, a file or a pipe with room."""

from rich.console import Console

WIDE = 120
"""Columns of text where there is no terminal to ask."""
LEAST = 80
"""Columns that a table is given on the narrowest terminal: there lines break, and no number is cut."""


def console_for_tables(console: Console | None = None) -> Console:
    """Standard output, or the console given, at least `LEAST` wide and `WIDE` where it is no terminal."""
    console = console or Console()
    console.width = max(console.width, LEAST if console.is_terminal else WIDE)
    return console
