"""`chela bench generation`: prompts read and tokens written, CHELA beside a Transformer with cached keys and values.

The models are those of the presets `lm-chela` and `lm-transformer` with random weights, on a CPU smaller ones. A prompt
is read with the training kernels, in pieces on carried state where it is long; then tokens are taken one by one, the
likeliest each time, by a `Decoder`, which on a GPU fuses and records both models' steps. A Transformer's keys and
values have room for exactly what is read and written. Times are the wall clock's, with all that Python does.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from chela.config import ModelConfig
from chela.evaluation.bench_suite import Shape
from chela.evaluation.timing import MIB, Time
from chela.models import CausalLM, ChelaState
from chela.models.decoding import Decoder
from chela.presets import preset

OP = "generation"
SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": tuple({"B": b, "T": t} for b in (1, 4) for t in (128, 512)),
    "cuda": tuple({"B": b, "T": t} for b in (1, 32) for t in (1024, 16_384, 131_072, 1_048_576)),
}
PIECE = 131_072
"""Tokens of all rows that CHELA reads at once; the Transformer's softmax reads a prompt whole."""
STEPS = {"cpu": 32, "cuda": 1024}
"""Tokens a row writes in one measurement: a whole epoch of the online convolution on a GPU."""
LONG = 5000
"""Milliseconds after which fewer than three repeats will do: a million tokens take the Transformer half a minute."""
CHECK = {"B": 2, "T": 96}
LAYERS = 2
"""Layers of the model that is checked: bfloat16's rounding in twelve untrained ones would hide a fault of 9 %."""


@dataclass(frozen=True)
class Result:
    """One model at one shape."""

    name: str
    model: ModelConfig
    shape: Shape
    times: dict[str, Time]
    """Milliseconds to read the prompt, "prefill", and of one token of every row, "step"."""
    row_mib: float
    """Memory of one row's state after the prompt."""
    peak_mib: float | None
    """Most memory held at once, on a GPU."""


def entrants(device: str) -> dict[str, ModelConfig]:
    """Who takes part on a kind of device."""
    models = {"chela": preset("lm-chela").model, "Transformer, SDPA": preset("lm-transformer").model}
    if device == "cuda":
        return models
    small = {"layers": 2, "d_model": 64, "d_ff": 128, "heads": 2, "kernel_length": 256}
    return {name: replace(model, **small, d_key=16, d_value=64) for name, model in models.items()}


def bench_generation(
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    *,
    peers: bool = True,
    shapes: tuple[Shape, ...] | None = None,
    console: Console,
) -> list[dict[str, object]]:
    """Hold prefill and steps of the first layers to their whole forward, then time the models: rows for `chela bench`.

    What does not fit in memory is said and left out.

    Raises:
        AssertionError: the check fails; nothing is timed.
    """
    results: list[Result] = []
    entering = list(entrants(device.type).items())[: None if peers else 1]
    errors = {name: check(config, device, dtype) for name, config in entering}
    for name, config in entering:
        with _model(config, device, dtype) as model:
            for shape in shapes or SHAPES[device.type]:
                where = f"{name} at B{shape['B']} T{shape['T']}"
                try:
                    results.append(run(name, model, shape, device, seconds))
                    found = f"{results[-1].times['step'].median:.3f} ms a step"  # minutes pass before the table
                except torch.OutOfMemoryError:
                    found = "out of memory"
                console.print(f"{where}: {found}", highlight=False, markup=False)
    console.print(_table(results))
    return [row for r in results for row in _rows(r, dtype, errors[r.name])]


def check(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative error of the logits of prefill and steps beside the whole forward in float32.

    Raises:
        AssertionError: it is more than twice that of the whole forward by the reference in `dtype`, and rounding.
    """
    tokens, half = _tokens(CHECK, device), CHECK["T"] // 2
    config = replace(config, layers=min(config.layers, LAYERS))
    with _model(config, device, torch.float32) as model:
        exact = model(tokens, impl="reference")[:, half:]
    with _model(config, device, dtype) as model:
        rough = model(tokens, impl="reference")[:, half:].float()
        _, state = model.prefill(tokens[:, :half])
        decoder = Decoder(model, state, room=CHECK["T"] - half)
        found = torch.stack([decoder.step(token).float() for token in tokens[:, half:].unbind(1)], 1)
    error, reference = (float((x - exact).abs().max() / exact.abs().max()) for x in (found, rough))
    budget = 2 * reference + torch.finfo(dtype).eps + 1e-5
    assert error <= budget, f"{OP}: logits are {error:.2g} off the whole forward's, with a budget of {budget:.2g}"
    return error


def run(name: str, model: CausalLM, shape: Shape, device: torch.device, seconds: float) -> Result:
    """Time one model's prefill and steps at a shape, and take its memory."""
    on_gpu, tokens, count = device.type == "cuda", _tokens(shape, device), STEPS[device.type]
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    piece = max(1, PIECE // shape["B"]) if model.config.mixer == "chela" else shape["T"]
    last: list[tuple[Tensor, ChelaState]] = []

    def read() -> None:
        last.clear()  # before the next one takes as much memory
        last.append(_read(model, tokens, piece))

    prefill = _measure(read, device, seconds)
    logits, state = last.pop()
    row_mib = state.nbytes / shape["B"] / MIB
    first, behind, kept = logits[:, -1].argmax(-1), [state], []
    del state

    def start() -> None:
        """Stand behind the prompt again, with a step recorded."""
        if model.config.mixer == "chela":
            kept[:] = []  # before the next one takes as much memory
            kept[:] = [Decoder(model, behind[0].clone())]
        elif kept:
            kept[0].rewind(count + 1)
        else:
            kept[:] = [Decoder(model, behind.pop(), room=count + 1)]
        kept[0].step(first)

    def write() -> None:
        token = first
        for _ in range(count):
            token = kept[0].step(token).argmax(-1)

    step = _measure(write, device, seconds, before=start).shared(count)
    peak = torch.cuda.max_memory_allocated(device) / MIB if on_gpu else None
    return Result(name, model.config, shape, {"prefill": prefill, "step": step}, row_mib, peak)


def _read(model: CausalLM, tokens: Tensor, piece: int) -> tuple[Tensor, ChelaState]:
    """Logits [B, 1, vocab] after the prompt, and the state."""
    state, found = None, None
    for part in tokens.split(piece, 1):
        found = model.prefill(part, state=state, last=1)
        state = found[1]
    assert found is not None
    return found


def _measure(
    work: Callable[[], object], device: torch.device, seconds: float, before: Callable[[], object] = lambda: None
) -> Time:
    """Wall clock of repeats for about so long, after one that may compile: at least three within LONG.

    What comes before each repeat is not timed.
    """

    def clock() -> float:
        before()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * (time.perf_counter() - began)

    clock()
    taken: list[float] = []
    while len(taken) < (3 if sum(taken) < LONG else 1) or (sum(taken) < 1000 * seconds and len(taken) < 50):
        taken.append(clock())
    low, median, high = np.quantile(taken, [0.2, 0.5, 0.8])
    return Time(float(median), float(low), float(high), len(taken))


@contextmanager
def _model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Iterator[CausalLM]:
    """The model, merged, while all is computed in a dtype and without gradients."""
    torch.manual_seed(0)
    model = CausalLM(config).to(device).eval()
    model.merge()
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield model


def _tokens(shape: Shape, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (shape["B"], shape["T"]), generator=generator).to(device)


def _rows(result: Result, dtype: torch.dtype, error: float) -> Iterator[dict[str, object]]:
    for name, taken in result.times.items():
        yield {
            "op": OP,
            "implementation": result.name,
            "shape": f"B{result.shape['B']} T{result.shape['T']} D{result.model.d_model}",
            "dtype": str(dtype).removeprefix("torch."),
            "pass": name,
            "median_ms": f"{taken.median:.5g}",
            "low_ms": f"{taken.low:.5g}",
            "high_ms": f"{taken.high:.5g}",
            "repeats": taken.repeats,
            "tokens_per_s": f"{_tokens_per_s(result, name):.5g}",
            "peak_mib": "" if result.peak_mib is None else f"{result.peak_mib:.0f}",
            "row_mib": f"{result.row_mib:.4g}",
            "floor_ms": "",
            "ratio_to_floor": "",
            "worst_relative_error": f"{error:.3g}",
        }


def _tokens_per_s(result: Result, name: str) -> float:
    tokens = result.shape["B"] * (result.shape["T"] if name == "prefill" else 1)
    return 1000 * tokens / result.times[name].median


def _table(results: list[Result]) -> Table:
    table = Table(title=OP, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True, min_width=22)
    for name in ("prefill\ntokens/s", "step\nms", "step\ntokens/s", "MiB\na row", "MiB\nat most"):
        table.add_column(name, justify="right", min_width=9)
    for shape in {str(r.shape): r.shape for r in results}.values():
        table.add_row(f"[bold]B{shape['B']} T{shape['T']}[/bold]")
        for r in (r for r in results if r.shape == shape):
            table.add_row(
                f"  {r.name}",
                f"{_tokens_per_s(r, 'prefill'):,.0f}",
                f"{r.times['step'].median:.3f}",
                f"{_tokens_per_s(r, 'step'):,.0f}",
                f"{r.row_mib:,.2f}",
                "" if r.peak_mib is None else f"{r.peak_mib:,.0f}",
            )
    return table
