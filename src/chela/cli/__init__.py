"""The command line: finds the command, and turns what goes wrong into one line and an exit code.

Exit codes: 0 done (also a training that was stopped and saved), 2 the user's mistake or too little
memory for what was asked, 1 ours, 130 interrupted.
"""

import io
import os
import re
import sys
import time
from collections.abc import Sequence

import chela
from chela.cli.commands import COMMANDS, presets_help, resolve
from chela.cli.parse import call


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; `words` default to the process's own."""
    words = sys.argv[1:] if words is None else list(words)
    # Torch's threads spin while they wait for each other; beside other work that makes a step many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported, which happens in a command
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a letter that the terminal does not have must not end a command
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except ValueError as error:
        if getattr(error, "said", False):  # of several processes the first one says it
            time.sleep(2)  # and does so before the launcher sees one end and stops all
        else:
            print(f"chela: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("chela: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # files that may not be read, a full disk
        what = f"cannot use {error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"chela: {' '.join(what.split())}", file=sys.stderr)
        return 2
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if _interrupted(error):
            print("chela: interrupted", file=sys.stderr)
            return 130
        if what := _out_of_memory(error):
            print(f"chela: {what}", file=sys.stderr)
            return 2
        raise


def overview() -> str:
    """What `chela --help` prints: a line for each command, from its docstring."""
    lines = [f"  {name:<9} {_summary(command)}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: chela COMMAND ...",
            "",
            (chela.__doc__ or "").splitlines()[0],
            "",
            "commands:",
            *lines,
            "",
            "`chela COMMAND --help` explains one; `chela train --help` lists the presets; `chela --version`.",
        ]
    )


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"chela {chela.__version__}")
        return 0
    if words in (["train", "-h"], ["train", "--help"]):
        print(presets_help())
        return 0
    call(*resolve(words))
    return 0


def _interrupted(error: BaseException | None) -> bool:
    """Whether an error came of a Ctrl-C: a library that was half imported then fails in a way of its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _out_of_memory(error: BaseException) -> str:
    """What to do about memory that was asked for and is not there; empty for any other error."""
    text = " ".join(str(error).split())
    # torch is not imported for every command: a GPU's error goes by its name, a CPU's is a RuntimeError by its words
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not known and not (isinstance(error, RuntimeError) and re.search("can't allocate memory|out of memory", text)):
        return ""
    wanted = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
    return (
        f"out of memory{f' ({wanted[1]} more were asked for)' if wanted else ''}: train with a smaller "
        "--train.batch-size, a larger --train.accumulate (the same batch in slices), --train.checkpoint-blocks or a "
        "smaller model, evaluate with a smaller --batch-size; checkpoints stay as they are"
    )


def _summary(command: object) -> str:
    return (command.__doc__ or "").splitlines()[0]
