"""What lies in the folders of runs: settings, weights, journals, and which runs belong together."""

import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from chela.config import RunConfig
from chela.models import CausalLM, Classifier, TwoTowerClassifier, load_model
from chela.presets import PRESETS, preset
from chela.record import differences, load_toml, to_dict
from chela.training import journal, metrics
from chela.training.checkpoint import HARMLESS
from chela.training.device import pick_device

INCIDENTAL = HARMLESS - {"preset"} | {"seed"}
"""Settings in which runs of one configuration may differ: the seed, and what does not change what is learned."""


@dataclass(frozen=True)
class Run:
    """One run as its folder records it."""

    folder: Path
    config: RunConfig
    journal: list[dict[str, Any]]

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """The journal's lines of a kind."""
        return [line for line in self.journal if line["kind"] == kind]

    def last(self, kind: str) -> dict[str, Any]:
        """The last line of a kind, or an empty one."""
        return next((line for line in reversed(self.journal) if line["kind"] == kind), {})

    @property
    def status(self) -> str:
        """`done`, `stopped`, `failed`, or `unfinished` (still running, or killed)."""
        return self.journal[-1]["status"] if self.journal and self.journal[-1]["kind"] == "end" else "unfinished"

    @property
    def test(self) -> dict[str, Any] | None:
        """The test's result, if the run is done."""
        return self.last("end").get("test") if self.status == "done" else None

    @property
    def best(self) -> dict[str, Any] | None:
        """The best validation so far."""
        best = None
        for line in self.lines("val"):
            if metrics.better(line, best, self.config.model.kind):
                best = line
        return best

    @property
    def step(self) -> int:
        """Steps done."""
        return max((line.get("step", 0) for line in self.journal), default=0)

    @property
    def seconds(self) -> float:
        """Time spent training and evaluating, as far as it is known."""
        return max((line.get("seconds", 0.0) for line in self.journal), default=0.0)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens trained on in a second: the median of the journal's lines, the first of which hold compiling."""
        rates = [line["tokens_per_s"] for line in self.lines("train") if "tokens_per_s" in line]
        return statistics.median(rates) if rates else None

    @property
    def peak_gib(self) -> float | None:
        """The most memory that tensors took on the GPU (of the first process) at once, if there was one."""
        return max((line["peak_gib"] for line in self.journal if "peak_gib" in line), default=None)


@dataclass(frozen=True)
class Group:
    """Runs of one configuration: the same settings but the seed."""

    name: str
    runs: list[Run]

    @property
    def config(self) -> RunConfig:
        """The settings they share."""
        return self.runs[0].config


def read_run(folder: Path) -> Run:
    """Settings and journal of a run.

    Raises:
        ValueError: not the folder of a run, or an unreadable file in it.
    """
    return Run(folder, load_toml(folder / "config.toml"), journal.read(folder / "metrics.jsonl"))


def place(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Where to compute; auto takes the GPU when there is one.

    Raises:
        ValueError: cuda where there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA GPU here: use --device cpu or auto")
    return pick_device(device)


def load_run(
    folder: Path, device: torch.device | str = "cpu"
) -> tuple[RunConfig, Classifier | TwoTowerClassifier | CausalLM]:
    """Settings and best weights of a run.

    Raises:
        ValueError: not the folder of a run, or its files are truncated or edited.
    """
    run = load_toml(folder / "config.toml")
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{weights} does not exist: the run in {folder} has not reached its first validation")
    return run, load_model(weights, run.model, device)


def group(runs: Sequence[Run]) -> list[Group]:
    """Put runs that differ in nothing but the seed together, in the order of first appearance, seeds ascending."""
    together: list[list[Run]] = []
    for run in runs:
        same = (members for members in together if not _departures(members[0].config, run.config))
        members = next(same, None)
        if members is None:
            together.append([run])
        else:
            members.append(run)
    firsts = [members[0].config for members in together]
    return [
        Group(_name(config, firsts), sorted(members, key=lambda run: run.config.seed))
        for config, members in zip(firsts, together, strict=True)
    ]


def command(config: RunConfig) -> str:
    """The command line that makes a run with these settings."""
    if config.preset not in PRESETS:
        return f"# settings of {config.preset!r}, which is no preset of this version: see config.toml"
    start = preset(config.preset)
    words = ["chela", "train", config.preset, "--seed", str(config.seed)]
    if config.out != start.out:
        words += ["--out", str(config.out)]
    for part in ("model", "data", "optim", "train"):
        before, after = to_dict(getattr(start, part)), to_dict(getattr(config, part))
        for key in (key for key in after if after[key] != before[key]):
            words += _option(part, key.replace("_", "-"), after[key])
    return shlex.join(words)


def _option(part: str, key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{part}.{key}" if value else f"--{part}.no-{key}"]
    return [f"--{part}.{key}", *map(str, value if isinstance(value, list) else [value])]


def key_of(difference: str) -> str:
    """The setting that a line of `differences` is about."""
    return difference.split(" was ")[0]


def _departures(first: RunConfig, config: RunConfig) -> list[str]:
    return [key for key in map(key_of, differences(first, config)) if key not in INCIDENTAL]


def _name(config: RunConfig, all_configs: Sequence[RunConfig]) -> str:
    """The preset, and where several configurations come from it, how this one departs from the first of them."""
    first = next(other for other in all_configs if other.preset == config.preset)
    return ", ".join([config.preset, *(f"{key} {_value(config, key)}" for key in _departures(first, config))])


def _value(config: RunConfig, key: str) -> str:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return str(value)
