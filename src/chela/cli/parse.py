"""From words to the arguments of a command: tyro parses, this file turns its boxes into one line."""

import contextlib
import inspect
import io
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import tyro

from chela.record import nearest

REWORDED = {
    r"^Error parsing (?!-)\S+: ": "",
    r"^Error parsing (--\S+): invalid literal for int\(\) .*: (.*)$": r"\1 wants a whole number: \2",
    r"^Error parsing (--\S+): could not convert string to float: ": r"\1 wants a number: ",
    r"^Error parsing (--\S+): Could not find valid parse for arguments: ": r"\1 does not take ",
    r"^Missing from (.+?): (-?\S+) .*$": r"\2 is missing: `\1 --help` explains it",
    r"^invalid choice (.*) for argument '(\S+)'\. Expected one of \((.*)\)\.$": r"\2 is one of \3; got \1",
    r"^Missing value for argument '(\S+)'. Expected 1 values.": r"\1 wants a value",
    r"^Missing value for argument '(\S+)'. Expected (\d+) values.": r"\1 wants \2 values",
}
"""tyro's words and ours."""


def call(command: Callable[..., Any], words: Sequence[str], prog: str) -> Any:
    """Call `command` with the arguments that `words` spell.

    Raises:
        ValueError: an unknown option (names the nearest), or a value that is missing or does not fit.
        SystemExit: help was asked for and printed.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            arguments, unknown = tyro.cli(_binder(command), args=list(words), prog=prog, return_unknown_args=True)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_message(box.getvalue())) from None
    if unknown:
        raise ValueError(_explain(unknown[0], list(words), command, prog))
    return command(*arguments.args, **arguments.kwargs)


def options(command: Callable[..., Any]) -> dict[str, Any]:
    """Every option of a command with its type; nested settings as `--part.name`."""
    return dict(_leaves(command, "--"))


def _binder(command: Callable[..., Any]) -> Callable[..., inspect.BoundArguments]:
    """Stand in for `command` and return its arguments: the command itself must not run inside the parser."""
    signature = inspect.signature(command)

    def bind(*args: Any, **kwargs: Any) -> inspect.BoundArguments:
        return signature.bind(*args, **kwargs)

    bind.__signature__ = signature  # pyrefly: ignore
    bind.__annotations__ = typing.get_type_hints(command, include_extras=True)
    bind.__doc__ = command.__doc__
    return bind


def _leaves(owner: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(owner, include_extras=True)
    names = [f.name for f in fields(owner)] if is_dataclass(owner) else list(inspect.signature(owner).parameters)
    for name in names:
        hint = hints[name]
        if is_dataclass(hint):
            yield from _leaves(hint, f"{prefix}{name}.")
        elif tyro.conf.Positional not in getattr(hint, "__metadata__", ()):
            yield f"{prefix}{name}".replace("_", "-"), hint


def _explain(word: str, words: list[str], command: Callable[..., Any], prog: str) -> str:
    known = options(command)
    position = words.index(word) if word in words else 0
    before = words[position - 1].replace("_", "-") if position else ""
    if known.get(before) is bool:
        part, _, name = before[2:].rpartition(".")
        return f"{before} takes no value: write {before} or --{part + '.' if part else ''}no-{name}"
    if not word.startswith("-"):
        return f"unexpected argument {word!r}: `{prog} --help` shows what it takes"
    name = word.split("=")[0]
    return f"unknown option {name}{nearest(name, [*known, '--help'])}: `{prog} --help` lists them"


def _message(box: str) -> str:
    """The message inside a box of tyro's (drawn with lines or plain), without title and pointers to the help."""
    lines: list[str] = []
    for raw in box.splitlines()[1:]:
        line = raw.strip("│╰╯ ")
        if set(line) <= set("─-"):
            if lines:
                break
        else:
            lines.append(line)
    text = " ".join(lines)
    for pattern, replacement in REWORDED.items():
        text = re.sub(pattern, replacement, text)
    return text
