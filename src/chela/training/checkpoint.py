"""Checkpoints: everything a run needs to go on bit by bit, in one folder a step, written whole or not at all.

checkpoint/step-00001200/ holds model.safetensors, optimizer.safetensors, state.json (step, best so far, settings),
best.safetensors (the weights of the best validation, the same file as the run's model.safetensors), carried.safetensors
(the state of each row, where it is carried from step to step), average.safetensors (averaged weights, where they are
kept) and SHA256SUMS, which `sha256sum -c` reads too. Nothing in it is code.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

import chela
from chela.config import RunConfig
from chela.disk import same_file, sync_folder, write_synced
from chela.record import differences, from_dict, to_dict
from chela.training.average import Average
from chela.training.carry import Carried

SUMS = "SHA256SUMS"
HARMLESS = {
    "out",
    "preset",
    "data.root",
    "train.time_limit",
    "train.keep",
    "train.log_every",
    "train.tensorboard",
    "train.save_every",
    "train.chance_after",
    "train.device",
}


@dataclass
class State:
    """Where a run stands between two steps, besides weights and averages."""

    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Time since the run began, over all starts."""
    trained: float = 0.0
    """Time spent on updates alone, but for each start's first: what `train.minutes` counts."""
    tokens: int = 0
    """Tokens read in these steps, without padding, over all processes."""
    best: dict[str, float] | None = None
    """The best validation, with its step."""
    sums: list[float] = field(default_factory=lambda: [0.0] * 3)
    """Since the last training line of the journal: loss, hits and gradient norm, added up,"""
    targets: int = 0
    """the labels they belong to,"""
    steps: int = 0
    """and the steps."""


def conflicts(old: RunConfig, new: RunConfig) -> list[str]:
    """Differences between two runs' settings that forbid going on from one with the other."""
    return [line for line in differences(old, new) if line.split(" was ")[0] not in HARMLESS]


def refuse_conflicts(old: RunConfig, new: RunConfig, folder: Path) -> None:
    """Refuse to mix two runs in one folder.

    Raises:
        ValueError: lists the differences and says what to do.
    """
    if lines := conflicts(old, new):
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(lines)}): "
            f"give this run another --out, or delete {folder} to start it again"
        )


def save_checkpoint(
    folder: Path,
    run: RunConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    best: Path,
    carried: Carried | None = None,
    average: Average | None = None,
) -> None:
    """Write checkpoint `state.step` in `folder` and delete all but the last `run.train.keep`.

    Args:
        folder: the run's checkpoint folder.
        run: settings to compare with on resume.
        model: on any device.
        optimizer: its averages.
        state: the rest.
        best: weights of the best validation; linked into the checkpoint if `state.best` is set.
        carried: the state of the rows, if it is carried from step to step.
        average: the averaged weights, if they are kept.
    """
    aside = folder / f"{_name(state.step)}.tmp"
    aside.mkdir(parents=True)
    record = {"chela": chela.__version__, **asdict(state), "run": to_dict(run)}
    contents = {
        "model.safetensors": _pack(model.state_dict()),
        "optimizer.safetensors": _pack(_averages(model, optimizer)),
        "state.json": json.dumps(record, indent=1, allow_nan=False).encode(),
    }
    if carried is not None:
        contents["carried.safetensors"] = _pack(carried.to_tensors())
    if average is not None:
        contents["average.safetensors"] = _pack(average.tensors)
    for name, content in contents.items():
        write_synced(aside / name, content)
    if state.best is not None:
        same_file(best, aside / "best.safetensors")
    sums = [f"{_digest(file)}  {file.name}\n" for file in sorted(aside.iterdir())]
    write_synced(aside / SUMS, "".join(sums).encode())
    sync_folder(aside)
    final = folder / _name(state.step)
    assert not final.exists(), "a run goes on from its newest checkpoint and saves a step once"
    aside.rename(final)
    sync_folder(folder)
    prune(folder, run.train.keep)


def steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())


def prune(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints, and what an interrupted save or deletion left."""
    for old in steps(folder)[:-keep]:
        old.rename(old.with_name(f"{old.name}.tmp"))
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path)


def verify(checkpoint: Path) -> tuple[State, RunConfig]:
    """Check every file of a checkpoint against its recorded SHA-256; returns what state.json holds.

    Raises:
        ValueError: names the damaged file, and says what to delete to go on.
    """
    damaged = _first_damaged(checkpoint)
    if damaged is None:
        try:
            record = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
            record = {"trained": 0.0, "tokens": 0} | record  # which older checkpoints lack
            state = State(**{f.name: record[f.name] for f in fields(State)})
            return state, from_dict(RunConfig, record["run"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{checkpoint / 'state.json'} was written by another version of chela ({error})") from None
    older = [path.name for path in steps(checkpoint.parent) if path.name < checkpoint.name]
    then = f"go on from {older[-1]}" if older else "start again"
    raise ValueError(f"{damaged} is missing, truncated or edited: delete the folder {checkpoint} to {then}")


def restore(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    carried: Carried | None = None,
    average: Average | None = None,
) -> None:
    """Put a verified checkpoint's weights, averages and carried state back in their places, bit by bit.

    Raises:
        ValueError: the tensors do not fit the model.
    """
    weights = _unpack(checkpoint / "model.safetensors")
    averages = _unpack(checkpoint / "optimizer.safetensors")
    misfit = f"{checkpoint} does not fit the model its settings describe: it was written by another version of chela"
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise ValueError(misfit) from None
    parameters = dict(model.named_parameters())
    for key, value in averages.items():
        name, _, kind = key.rpartition(":")
        if name not in parameters or (kind != "step" and value.shape != parameters[name].shape):
            raise ValueError(misfit)
        optimizer.state[parameters[name]][kind] = value.to(parameters[name].device)
    if carried is not None and not put_back(carried.to_tensors(), _unpack(checkpoint / "carried.safetensors")):
        raise ValueError(misfit)
    if average is not None and not put_back(average.tensors, _unpack(checkpoint / "average.safetensors")):
        raise ValueError(misfit)


def put_back(places: dict[str, Tensor], tensors: dict[str, Tensor]) -> bool:
    """Copy tensors to their places, bit by bit; False (and nothing changed) where names or shapes do not fit."""
    fits = places.keys() == tensors.keys() and all(places[name].shape == x.shape for name, x in tensors.items())
    for name in tensors if fits else ():
        places[name].copy_(tensors[name])
    return fits


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _averages(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}:{kind}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def _pack(tensors: dict[str, Tensor]) -> bytes:
    return save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def _unpack(path: Path) -> dict[str, Tensor]:
    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error})") from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_damaged(checkpoint: Path) -> Path | None:
    table = checkpoint / SUMS
    required = {"model.safetensors", "optimizer.safetensors", "state.json"}
    try:
        lines = [line.split("  ", 1) for line in table.read_text(encoding="utf-8").splitlines()]
        recorded = {name: digest for digest, name in lines}
    except (OSError, ValueError):
        return table
    if not required <= recorded.keys():
        return table
    for name, digest in recorded.items():
        path = checkpoint / name
        if path.parent != checkpoint or not path.is_file() or _digest(path) != digest:
            return path
    return None
