"""A run, from its settings to its tested weights: its folder is taken over, its data loaded, and the loop begins."""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from chela.config import RunConfig
from chela.data import load_task
from chela.duration import seconds
from chela.training import distributed, metrics
from chela.training.checks import check_run
from chela.training.device import deterministic_if
from chela.training.folder import Found, RunFolder
from chela.training.interrupt import Interrupt
from chela.training.loop import Trainer
from chela.training.progress import Display
from chela.training.start import starting_weights


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    folder: Path
    """Where it lives."""
    status: str
    """"done", "stopped" (the same command goes on) or "already done"."""
    step: int
    """Steps done."""
    validation: dict[str, float] | None
    """The best validation, with its step."""
    test: dict[str, float] | None
    """The test with the best weights, once done."""


def train(run: RunConfig, *, console: Console | None = None) -> Result:
    """Train a run, or go on with it, and test it once.

    The folder is the state: the same call goes on from the newest checkpoint as if it had never stopped, and returns
    the recorded result of a finished run. Under torchrun all processes call it alike.

    Args:
        run: every setting.
        console: where progress is shown; standard output by default.

    Raises:
        ValueError: settings that do not fit the task, a folder that is in use or another run's, a damaged checkpoint,
            missing data, weights to start from that do not fit. Nothing has been written then.
        NonFinite: loss or gradients became infinite or NaN; names the layer. The last checkpoint stays.
    """
    started = time.monotonic()
    display, folder = Display(console, run.train.steps), RunFolder(run.folder)
    try:
        with distributed.world(run.train.device) as device, deterministic_if(run.train.deterministic), folder:
            found = Found.from_json(distributed.on_main(lambda: folder.inspect(run).to_json()))
            if found.end is not None:
                display.say(f"{folder.path} is already done: test {metrics.text(found.end['test'])}")
                return Result(folder.path, "already done", found.end["step"], found.end["best"], found.end["test"])
            task = distributed.main_first(lambda: load_task(run.data, progress=display.say))
            check_run(run, task)
            begin = run.train.start_from and not found.checkpoint
            weights = starting_weights(run, task.tokenizer) if begin else None
            distributed.on_main(lambda: folder.claim(run, found, task.tokenizer))
            limit = seconds(run.train.time_limit)
            interrupt = Interrupt(None if limit is None else started + limit)
            with interrupt:  # from here on: what torch imports while a model is made may swallow a Ctrl-C
                trainer = Trainer(run, task, folder, found, device, display, weights)
            with trainer:
                finished = trainer.fit(interrupt)
                test = trainer.test() if finished else None
            status = "done" if finished else "stopped"
            return Result(folder.path, status, trainer.state.step, trainer.state.best, test)
    except OSError as error:  # a full disk, a folder that is not ours; checkpoints are whole or absent
        raise ValueError(f"cannot use {error.filename or folder.path}: {error.strerror or error}") from error
