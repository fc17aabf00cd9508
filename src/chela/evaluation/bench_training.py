"""`chela bench training`: whole updates, forward pass to AdamW, of language models at the same width and depth.

Six blocks of width 128 on bytes, the tokens of a step constant while the length grows. CHELA beside a Transformer of
about the same parameters, and beside CHELA's convolutions alone by torch's FFT. All go through the trainer's own
update: on a GPU blocks compiled and one CUDA graph, on a CPU kernel by kernel.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from chela.config import ModelConfig, RunConfig, TrainConfig
from chela.data import Batch
from chela.evaluation.bench_suite import Shape
from chela.evaluation.timing import Time, measure
from chela.models import build
from chela.ops.impl import Impl
from chela.training.guard import Guard
from chela.training.optim import make_optimizer
from chela.training.stream import Share
from chela.training.update import Learner, Update, compile_blocks, make_update

OP = "training step"
TOKENS = 131_072
SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": tuple({"B": 1024 // t, "T": t} for t in (128, 512)),
    "cuda": tuple(
        {"B": TOKENS // t, "T": t} for t in (128, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
    ),
}
CHECK = {"B": 2, "T": 96}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of loss and gradient norm beside the plain update on the reference, relative: a few roundings of the dtype."""


@dataclass(frozen=True)
class Entrant:
    """A model that takes part."""

    name: str
    model: ModelConfig
    impl: Impl = "auto"
    longest: int = 2**62
    """Longest sequence worth waiting for on a GPU."""


@dataclass(frozen=True)
class Result:
    """One entrant at one shape."""

    entrant: Entrant
    shape: Shape
    time: Time
    first_s: float
    """Seconds to the end of the first update: compilation and recording included."""
    peak_mib: float | None
    """Most memory held at once, on a GPU."""


def entrants(length: int) -> list[Entrant]:
    """Who takes part at a length; kernels as long as that, with parameters O(log length)."""
    chela = ModelConfig(
        kind="causal-lm", causal=True, vocab=256, layers=6, kernel_length=length, kernel="multiscale", norm="rms"
    )
    return [
        Entrant("chela", chela),
        Entrant("Transformer, SDPA", replace(chela, mixer="transformer", heads=4, d_ff=448), longest=32_768),
        Entrant("convolutions by FFT", replace(chela, attention=False), impl="reference"),
    ]


def bench_training(
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    *,
    peers: bool = True,
    shapes: tuple[Shape, ...] | None = None,
    console: Console,
) -> list[dict[str, object]]:
    """Check CHELA's update against the plain one, then time everybody's; rows for the table of `chela bench`.

    Raises:
        AssertionError: the check fails; nothing is timed.
    """
    error = check(device, dtype)
    results: list[Result] = []
    for shape in shapes or SHAPES[device.type]:
        for entrant in entrants(shape["T"])[: None if peers else 1]:
            if shape["T"] <= entrant.longest:
                results.append(run(entrant, shape, device, dtype, seconds))
                found = f"{entrant.name} at B{shape['B']} T{shape['T']}: {results[-1].time.median:.2f} ms"
                console.print(found, highlight=False, markup=False)  # minutes pass before the table
    console.print(_table(results))
    return [_row(result, dtype, error if result.entrant.name == "chela" else None) for result in results]


def check(device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative difference of loss and gradient norm between the fast update and the plain one in float32.

    Raises:
        AssertionError: it is larger than rounding explains.
    """
    entrant = entrants(CHECK["T"])[0]
    found = []
    for impl, kind, fast in ((entrant.impl, dtype, True), ("reference", torch.float32, False)):
        with _update(replace(entrant, impl=impl), CHECK, device, kind, fast=fast) as (update, share, sums):
            update(share, share.targets, 0)
            found.append(sums[[0, 2]].clone())  # loss and gradient norm
    error = float(((found[0] - found[1]) / found[1]).abs().max())
    assert error <= TOLERANCE[dtype], f"{OP}: loss or gradient norm is {error:.2g} off the plain update's"
    return error


def run(entrant: Entrant, shape: Shape, device: torch.device, dtype: torch.dtype, seconds: float) -> Result:
    """Time one entrant's update, and take its memory."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began = time.monotonic()
    with _update(entrant, shape, device, dtype, fast=True) as (update, share, sums):
        update(share, share.targets, 0)
        sums.tolist()  # waits for the device
        first = time.monotonic() - began
        taken = measure(lambda: update(share, share.targets, 1), device, seconds)
        peak = torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else None
    return Result(entrant, shape, taken, first, peak)


@contextmanager
def _update(
    entrant: Entrant, shape: Shape, device: torch.device, dtype: torch.dtype, *, fast: bool
) -> Iterator[tuple[Update, Share, Tensor]]:
    """An update on random bytes, the share it takes, and the sums it adds to."""
    settings = RunConfig(model=entrant.model, train=TrainConfig(batch_size=shape["B"], compile=fast))
    torch.manual_seed(0)
    model = build(entrant.model).to(device)
    tokens = torch.randint(256, (shape["B"], shape["T"] + 1), generator=torch.Generator().manual_seed(1))
    share = Share(
        [Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())], tokens[:, 1:].numel(), tokens.numel()
    )
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    optimizer = make_optimizer(model, settings.optim)
    if fast and device.type == "cuda":
        compile_blocks(model)
    with (
        _implementation(model, entrant.impl),
        make_update(Learner(model, optimizer, Guard(device), sums, settings, dtype)) as update,
    ):
        yield update, share, sums


@contextmanager
def _implementation(model: nn.Module, impl: Impl) -> Iterator[None]:
    """Let every block take an implementation whatever it is asked for."""

    def named(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"impl": impl}

    handle = model.backbone.register_forward_pre_hook(named, with_kwargs=True)  # pyrefly: ignore
    try:
        yield
    finally:
        handle.remove()


def _row(result: Result, dtype: torch.dtype, error: float | None) -> dict[str, object]:
    tokens = result.shape["B"] * result.shape["T"]
    return {
        "op": OP,
        "implementation": result.entrant.name,
        "shape": f"B{result.shape['B']} T{result.shape['T']} D{result.entrant.model.d_model}",
        "dtype": str(dtype).removeprefix("torch."),
        "pass": "update",
        "median_ms": f"{result.time.median:.5g}",
        "low_ms": f"{result.time.low:.5g}",
        "high_ms": f"{result.time.high:.5g}",
        "repeats": result.time.repeats,
        "tokens_per_s": f"{1000 * tokens / result.time.median:.5g}",
        "first_s": f"{result.first_s:.3g}",
        "peak_mib": "" if result.peak_mib is None else f"{result.peak_mib:.0f}",
        "floor_ms": "",
        "ratio_to_floor": "",
        "worst_relative_error": "" if error is None else f"{error:.3g}",
    }


def _table(results: list[Result]) -> Table:
    table = Table(title=f"{OP}, 6 layers, D128", title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True, min_width=22)
    for name in ("ms", "us /\ntoken", "tokens/s", "MiB", "first\nstep s", "parameters"):
        table.add_column(name, justify="right", min_width=6)
    last = None
    for result in results:
        if result.shape != last:
            table.add_row(f"[bold]B{result.shape['B']} T{result.shape['T']}[/bold]")
            last = result.shape
        tokens = result.shape["B"] * result.shape["T"]
        table.add_row(
            f"  {result.entrant.name}",
            f"{result.time.median:.2f}",
            f"{1000 * result.time.median / tokens:.3f}",
            f"{1000 * tokens / result.time.median:,.0f}",
            "" if result.peak_mib is None else f"{result.peak_mib:,.0f}",
            f"{result.first_s:.1f}",
            f"{sum(p.numel() for p in build(result.entrant.model).parameters()):,}",
        )
    return table
