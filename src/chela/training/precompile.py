"""Triton's kernels compiled side by side, before a step needs them.

Triton compiles a kernel where it is first launched, one after the other, and a layer has about thirty. So a model of
one layer takes a step for show: Triton's hook notes what each launch would compile, and nothing is compiled or launched
meanwhile. Threads then compile it all (the compiler lets go of Python's lock) while the blocks are traced. What the
show does not meet is compiled where it is launched, as ever; it needs a Triton that has `knobs`, from 3.4 on.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from chela.config import RunConfig
from chela.data import Batch
from chela.models import build
from chela.training.carry import Carried
from chela.training.metrics import loss_and_hits
from chela.training.step import Objective, add_gradients
from chela.training.stream import pad

Wanted = tuple[Any, str]
"""A kernel, and what Triton needs to compile it for some types, constants and alignments."""


def precompile(run: RunConfig, batch: Batch, dtype: torch.dtype) -> list[Future[Any]]:
    """Begin to compile, in threads, what steps and evaluations launch.

    Args:
        run: every setting.
        batch: the first one, on a GPU; where lengths vary, the longest possible stands beside it.
        dtype: compute type.

    Returns:
        What is under way. Nobody has to wait for it: a kernel that is launched before it is done is compiled there.
    """
    if run.model.mixer != "chela":  # kernels of others are tuned while they are launched
        return []
    batches = [batch]
    if run.train.pad_multiple > 1 and run.model.kind != "causal-lm" and run.model.kernel_length:
        batches.append(pad(batch, run.model.kernel_length, run.model.kernel_length))
    device = batch.inputs.device
    return begin(would_compile(lambda: _rehearse(run, batches, dtype)), device)


def begin(wanted: list[Wanted], device: torch.device) -> list[Future[Any]]:
    """Begin to compile all that, in threads."""
    pool = ThreadPoolExecutor(os.cpu_count(), "chela-compile", torch.cuda.set_device, (device,))
    jobs = [pool.submit(kernel.preload, how) for kernel, how in wanted]
    pool.shutdown(wait=False)
    return jobs


def would_compile(act: Callable[[], object]) -> list[Wanted]:
    """What Triton would compile if `act` ran, which runs without it: whatever the kernels would write stays as it was.

    Kernels that are compiled already do run. Of a Triton without `knobs`, or of none, nothing: `act` does not run then.
    """
    if find_spec("triton") is None or find_spec("triton.knobs") is None:
        return []
    from triton import knobs

    wanted: dict[tuple[int, str], Wanted] = {}

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        wanted[id(fn.jit_function), key] = fn.jit_function, compile["specialization_data"]
        return True  # neither compile nor launch

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note  # pyrefly: ignore
    try:
        act()
    finally:
        knobs.runtime.jit_cache_hook = before
    return list(wanted.values())


def _rehearse(run: RunConfig, batches: list[Batch], dtype: torch.dtype) -> None:
    """Go through the motions of a step and of an evaluation, on a model of its own."""
    device = batches[0].inputs.device
    model = build(replace(run.model, layers=1)).to(device)
    carried = Carried(model, len(batches[0].inputs), dtype) if run.train.carry_state else None
    try:
        for batch in batches:
            add_gradients(Objective(model.train()), batch, 1.0, dtype, carried)
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss_and_hits(model.eval(), batch)
    except torch.OutOfMemoryError:
        pass  # without the compiled blocks a layer takes more memory; what was met so far is worth having
    del model, carried
    torch.cuda.empty_cache()
