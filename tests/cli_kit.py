"""Runs small enough for tests of the command line, and what to hold its refusals to."""

import hashlib
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from chela.cli import main

SMALL = (
    *("--model.layers", "1", "--model.d-model", "8", "--model.d-ff", "8", "--model.d-key", "4", "--model.d-value", "8"),
    *("--optim.warmup", "1", "--train.steps", "4", "--train.batch-size", "8", "--train.eval-every", "2"),
    *("--train.save-every", "2", "--train.log-every", "1", "--train.eval-examples", "16", "--train.device", "cpu"),
)


def chela(*words: object) -> tuple[int, str, str]:
    """Run a command line in this process: exit code, standard output, standard error."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def succeed(*words: object) -> str:
    """Run a command line that must end well; its standard output."""
    code, out, err = chela(*words)
    assert code == 0, err
    return out


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of change of every file in a folder."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refuse(folder: Path, *words: object) -> str:
    """Run a command line that must be refused as the user's mistake, leaving `folder` as it is; its one line."""
    before = contents(folder)
    code, out, err = chela(*words)
    assert code == 2, (code, out, err)
    assert err.startswith("chela: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert contents(folder) == before
    return err


def write_texts(root: Path) -> None:
    """The files of the task `bytes`."""
    (root / "bytes").mkdir(parents=True)
    for number, name in enumerate(("train", "valid", "test")):
        (root / "bytes" / f"{name}.txt").write_text("the cat sat on the mat. " * (40 - 15 * (number > 0)))


def train_digits(folder: Path, *words: object) -> str:
    """A finished run on digits in `folder`."""
    return succeed("train", "digits", *SMALL, "--out", folder, *words)


def train_bytes(folder: Path, root: Path, *words: object) -> str:
    """A finished run of a language model in `folder`."""
    return succeed(
        *("train", "lm-tiny", *SMALL, "--data.root", root, "--data.max-length", 32, "--model.kernel-length", 32),
        *("--out", folder, *words),
    )
