"""The folder of a run: whose it is, how far it got, and that one process alone writes in it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import tomli_w

from chela.config import RunConfig
from chela.data import tokenizer
from chela.disk import same_file, write_whole
from chela.record import load_toml, to_dict
from chela.training import checkpoint, journal
from chela.training.checkpoint import State


@dataclass(frozen=True)
class Found:
    """What a folder held."""

    end: dict[str, Any] | None = None
    """The journal's last line, if the run is finished."""
    checkpoint: str = ""
    """Name of the newest checkpoint."""
    state: State = field(default_factory=State)
    """Its state; the beginning, where there is none."""

    def to_json(self) -> str:
        """As text, for the other processes."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Found":
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls(**values | {"state": State(**values["state"])})


class RunFolder:
    """Paths of a run and the steps of taking it over. All writing is for rank 0."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.journal = path / "metrics.jsonl"
        self.weights = path / "model.safetensors"
        self.checkpoints = path / "checkpoint"
        self.tokenizer = path / tokenizer.FILE
        self._held: IO[str] | None = None

    def inspect(self, run: RunConfig) -> Found:
        """Look before anything is loaded; locks the folder if it holds a run, and changes nothing else.

        Raises:
            ValueError: in use, another run's, not a run's, or damaged.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file, not a folder: give the run another --out")
        if not self.config.exists():
            for path in (self.journal, self.weights, self.checkpoints):
                if path.exists():
                    raise ValueError(f"{path} exists, but {self.config} does not: give the run another --out")
            return Found()
        self._lock()
        old, saved = load_toml(self.config), checkpoint.steps(self.checkpoints)
        if saved or self.weights.exists():
            checkpoint.refuse_conflicts(old, run, self.path)
        if self.weights.exists() and self.journal.exists():
            entries = journal.read(self.journal)
            if entries and entries[-1].get("status") == "done":
                return Found(end=entries[-1])
        if not saved:
            return Found()
        state, recorded = checkpoint.verify(saved[-1])
        checkpoint.refuse_conflicts(recorded, run, self.path)
        return Found(checkpoint=saved[-1].name, state=state)

    def claim(self, run: RunConfig, found: Found, tokens: str = "") -> None:
        """Make the folder this run's: lock it, write its settings, rewind journal and best weights to the checkpoint.

        Args:
            run: every setting.
            found: what `inspect` found.
            tokens: content of the tokenizer.json of its data; empty for data without one.

        Raises:
            ValueError: in use, or begun with another tokenizer.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self._held is None:
            self._lock()
            if self.config.exists():
                raise ValueError(f"another process has just begun in {self.path}: give this run another --out")
        if found.checkpoint:
            check_tokenizer(self.path, tokens)
        write_whole(self.config, tomli_w.dumps(to_dict(run)).encode())
        if tokens:
            write_whole(self.tokenizer, tokens.encode())
        else:
            self.tokenizer.unlink(missing_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        checkpoint.prune(self.checkpoints, run.train.keep)
        if found.checkpoint:
            journal.cut(self.journal, found.state.step)
        else:
            self.journal.unlink(missing_ok=True)
        if found.state.best is not None:
            same_file(self.checkpoints / found.checkpoint / "best.safetensors", self.weights)
        else:
            self.weights.unlink(missing_ok=True)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        """Let other processes have the folder; the system does the same when this process is killed."""
        if self._held:
            self._held.close()
            self._held = None

    def _lock(self) -> None:
        import fcntl  # POSIX

        held = (self.path / ".lock").open("a")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.close()
            raise ValueError(f"{self.path} is in use by another process: wait for it, or give another --out") from None
        self._held = held


def check_tokenizer(folder: Path, tokens: str) -> None:
    """Refuse data whose tokens mean something else than those a run was trained on.

    Args:
        folder: the run's.
        tokens: content of the tokenizer.json of the data; empty for data without one.

    Raises:
        ValueError: the folder has another one, or none where the data have one.
    """
    path = folder / tokenizer.FILE
    recorded = path.read_text(encoding="utf-8") if path.is_file() else ""
    if recorded != tokens:
        raise ValueError(
            f"the tokenizer of the data is not the one in {path}: the training text has changed since; "
            "name the folder that has the old one with --data.root"
        )
