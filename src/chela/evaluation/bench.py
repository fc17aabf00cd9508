"""`chela bench`: every implementation is checked first, then timed; a table to read, a CSV and plots to keep.

The floor of a pass is the time a plain copy needs for its bytes, measured in the same run: forward, every input is read
and the output written once; backward, inputs and the output's gradient are read and the inputs' gradients written.
"""

import csv
import datetime
import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TextIO

import torch
from rich.console import Console
from torch import Tensor

from chela.evaluation import bench_plot
from chela.evaluation.bench_cases import SUITES
from chela.evaluation.bench_generation import bench_generation
from chela.evaluation.bench_suite import Contender, Inputs, Shape, Suite
from chela.evaluation.bench_table import Measured, flatness, shape_text, table
from chela.evaluation.bench_training import bench_training
from chela.evaluation.runs import place
from chela.evaluation.terminal import console_for_tables
from chela.evaluation.timing import Time, copy_speed, measure
from chela.ops.impl import resolve
from chela.ops.random_inputs import draw
from chela.ops.testing import check_op
from chela.record import nearest
from chela.training.device import compute_type
from chela.training.journal import surroundings

MODELS = {"training": bench_training, "generation": bench_generation}
"""Whole models, timed when asked for by name: they take minutes."""
COLUMNS = (
    *("op", "implementation", "shape", "dtype", "pass", "median_ms", "low_ms", "high_ms", "repeats", "tokens_per_s"),
    *("floor_ms", "ratio_to_floor", "copy_gb_per_s", "first_s", "peak_mib", "row_mib"),
    *("worst_relative_error", "device", "threads", "chela", "torch", "triton", "python", "commit", "date"),
)


def run_bench(
    ops: Sequence[str],
    *,
    out: Path,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    seconds: float = 0.3,
    peers: bool = True,
    shapes: dict[str, tuple[Shape, ...]] | None = None,
    console: Console | None = None,
) -> list[dict[str, object]]:
    """Check and time ops, print tables and write every measurement to a CSV file, with plots beside it.

    Args:
        ops: names of suites, "training" or "generation"; none for all suites.
        out: the CSV file, written anew; an earlier one stays until all is measured (`out.part` has what was).
        device: where to compute.
        dtype: of the inputs; auto is bfloat16 on a GPU.
        seconds: spent on each measurement.
        peers: also time others who do the same job, where they are installed.
        shapes: other shapes than the suites' own, by op.
        console: where the tables are printed.

    Returns:
        The rows of the file.

    Raises:
        ValueError: an unknown op, a device that is not there, a file that cannot be written.
        AssertionError: an implementation of ours fails its check; nothing of its suite is timed.
    """
    names = (*SUITES, *MODELS)
    for name in ops:
        if name not in names:
            raise ValueError(f"unknown op {name!r}{nearest(name, names)}; ops: {', '.join(names)}")
    if seconds < 0:
        raise ValueError(f"seconds must not be negative, got {seconds}")
    where, console, rows = place(device), console_for_tables(console), []
    kind, provenance = compute_type(dtype, where), _provenance(where)
    with _written(out) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        speed = copy_speed(where, min(seconds, 0.3))
        provenance["copy_gb_per_s"] = f"{speed / 1e9:.5g}"
        console.print(_headline(provenance, kind), highlight=False, markup=False)
        console.print(f"a copy: {speed / 1e9:,.0f} GB/s, read and written", highlight=False, markup=False)
        for suite in (suite for name in ops or SUITES for suite in SUITES.get(name, ())):
            errors = _check(suite, kind, where)
            entrants = _entrants(suite, errors, peers, console)
            measured = []
            for shape in (shapes or {}).get(suite.op, suite.shapes[where.type]):
                measured += _time(suite, shape, entrants, errors, kind, where, seconds, speed, console)
            new = [row | provenance for m in measured for row in _rows(suite, m, kind)]
            writer.writerows(new)
            file.flush()
            rows += new
            console.print(table(suite, measured))
            for line in flatness(suite, measured) if suite.flat else ():
                console.print(line, highlight=False, markup=False)
        for name in (name for name in MODELS if name in ops):
            chosen = (shapes or {}).get(name)
            new = MODELS[name](where, kind, seconds, peers=peers, shapes=chosen, console=console)
            new = [row | provenance for row in new]
            writer.writerows(new)
            file.flush()
            rows += new
    console.print(f"{len(rows)} measurements with their 20 and 80 % quantiles in {out}", highlight=False, markup=False)
    for line in bench_plot.write(rows, out):
        console.print(line, highlight=False, markup=False)
    return rows


@contextmanager
def _written(out: Path) -> Iterator[TextIO]:
    """A file that takes the place of `out` when all is measured; until then an old table stays."""
    part = out.with_name(f"{out.name}.part")
    try:
        with part.open("w", newline="", encoding="utf-8") as file:
            yield file
        part.replace(out)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror}") from None


def _check(suite: Suite, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Hold values and gradients of all our implementations that run here to float64; largest relative errors."""
    inputs = suite.make(suite.check, dtype=dtype, device=device)
    checked = {}
    for contender in suite.contenders:
        if contender.impl and all(_runs(contender.impl, device, op) for op in suite.uses):
            try:
                errors = check_op(contender.run, suite.plain, inputs, gradients=suite.gradients)
            except AssertionError as error:
                raise AssertionError(f"{suite.op}, {contender.name}, {dtype} on {device}: {error}") from None
            checked[contender.name] = max(errors.values())
    return checked


def _runs(impl: str, device: torch.device, op: str) -> bool:
    if impl == "triton" and device.type != "cuda":
        return False  # Triton's interpreter on a CPU is for tests
    try:
        resolve(impl, device, op)  # pyrefly: ignore
    except ValueError:
        return False
    return True


def _entrants(suite: Suite, errors: dict[str, float], peers: bool, console: Console) -> list[Contender]:
    """Ours that passed their check, and the peers that are wanted and installed."""
    entrants = []
    for contender in suite.contenders:
        if contender.impl:
            entrants += [contender] * (contender.name in errors)
        elif peers and contender.missing():
            console.print(
                f"{contender.name}: skipped, {contender.package} is not installed", highlight=False, markup=False
            )
        elif peers:
            entrants.append(contender)
    return entrants


def _time(
    suite: Suite,
    shape: Shape,
    entrants: Sequence[Contender],
    errors: dict[str, float],
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    speed: float,
    console: Console,
) -> list[Measured]:
    inputs = suite.make(shape, dtype=dtype, device=device, on_device=True)
    measured = []
    for contender in entrants:
        if not contender.takes(shape, device):
            continue
        try:
            times, out = _measure(suite, contender, contender.prepare(inputs, shape), device, seconds)
        except Exception as error:
            if contender.impl:
                raise
            said = " ".join(str(error).split())[:200]  # a peer that cannot is a finding, no reason to stop
            where = f"{contender.name} at {shape_text(shape)}"
            console.print(f"{where}: {type(error).__name__}: {said}", highlight=False, markup=False)
            continue
        floors = _floors(inputs, out, speed) if suite.floor else {}
        measured.append(Measured(contender, shape, times, floors, errors.get(contender.name)))
    return measured


def _measure(
    suite: Suite, contender: Contender, inputs: Inputs, device: torch.device, seconds: float
) -> tuple[dict[str, Time], int]:
    """Times by pass, and the bytes of the output."""
    with torch.no_grad():
        times = {"forward": measure(lambda: contender.run(**inputs), device, seconds)}
        out = contender.run(**inputs)
        times["forward"] = times["forward"].shared(suite.steps(out))
    if suite.backward:
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        cotangent = draw(*out.shape, seed=9, dtype=out.dtype, device=device, on_device=True)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(contender.run(**leaves), tuple(leaves.values()), cotangent)

        times["forward+backward"] = measure(both, device, seconds)
    return times, out.nbytes


def _floors(inputs: Inputs, out: int, speed: float) -> dict[str, float]:
    """Milliseconds by pass, given the bytes of the output and those copied in a second."""
    read = sum(x.nbytes for x in inputs.values())
    forward = read + out
    return {"forward": 1000 * forward / speed, "forward+backward": 1000 * (forward + read + out + read) / speed}


def _rows(suite: Suite, m: Measured, dtype: torch.dtype) -> list[dict[str, object]]:
    return [
        {
            "op": suite.op,
            "implementation": m.contender.name,
            "shape": shape_text(m.shape),
            "dtype": str(dtype).removeprefix("torch."),
            "pass": name,
            "median_ms": f"{time.median:.5g}",
            "low_ms": f"{time.low:.5g}",
            "high_ms": f"{time.high:.5g}",
            "repeats": time.repeats,
            "tokens_per_s": f"{1000 * suite.tokens(m.shape) / time.median:.5g}",
            "floor_ms": f"{m.floors[name]:.5g}" if m.floors else "",
            "ratio_to_floor": f"{time.median / m.floors[name]:.5g}" if m.floors else "",
            "worst_relative_error": "" if m.error is None else f"{m.error:.3g}",
        }
        for name, time in m.times.items()
    ]


def _provenance(device: torch.device) -> dict[str, object]:
    facts = surroundings(device)
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    named = {key: facts.get(key, "") for key in ("device", "threads", "chela", "torch", "python", "commit")}
    return named | {"triton": triton, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}


def _headline(provenance: dict[str, object], dtype: torch.dtype) -> str:
    return (
        f"{provenance['device']}, {provenance['threads']} threads, torch {provenance['torch']}, "
        f"triton {provenance['triton'] or 'not installed'}, {str(dtype).removeprefix('torch.')}"
    )
