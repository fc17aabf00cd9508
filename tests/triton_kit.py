"""Triton without a GPU and without its interpreter: kernels are specialised as they would be on an H100 or a GeForce.

As a script, `python triton_kit.py NAME`: runs a census below and prints what it found as JSON.
"""

import functools
import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

MODULES = [
    "batch_norm.fused", "feed_forward.fused", "gated_output.fused", "linear_attention.fused", "linear_attention.plan",
    "long_conv.fused", "long_conv.on_chip", "long_conv.panels", "long_conv.toeplitz",
    "short_conv.fused",
]  # fmt: skip
HALF = {"dtype": torch.bfloat16}


class Absent:
    """Stands for Triton's driver of a GPU that is not there."""

    capability = 90

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def pretend(capability: int = 90) -> None:
    """Make the ops run their kernels' launches on tensors of the CPU, with the plans of a GPU of 132 processors."""
    from triton.runtime import driver

    Absent.capability = capability
    driver.set_active(Absent())  # pyrefly: ignore
    modules = {name: importlib.import_module(f"chela.ops.{name}") for name in MODULES}
    os.environ["TRITON_INTERPRET"] = "1"  # read by `resolve`; Triton has read it before
    modules["linear_attention.plan"].multiprocessors = lambda device: 132  # pyrefly: ignore
    modules["feed_forward.fused"]._programs = lambda device: 132  # pyrefly: ignore
    impl = importlib.import_module("chela.ops.impl")
    importlib.import_module("chela.training")
    plain, roomy = impl.resolve, importlib.import_module("chela.ops.launch").roomy
    for name, module in list(sys.modules.items()):
        if name.startswith("chela") and getattr(module, "resolve", None) is plain:
            module.resolve = functools.partial(_resolve, plain)  # pyrefly: ignore
        if name.startswith("chela") and getattr(module, "roomy", None) is roomy:
            module.roomy = lambda device: capability == 90  # pyrefly: ignore


def _resolve(plain: Any, impl: str, device: torch.device, op: str) -> str:
    return plain("triton" if impl == "auto" else impl, device, op)


def lengths_census(name: str) -> list[int]:
    """Kernels an op has asked for after each of 50 lengths, forward and backward."""
    from chela import ops
    from chela.ops import random_inputs
    from chela.ops.batch_norm import batch_norm
    from chela.ops.feed_forward import feed_forward
    from chela.ops.gated_output import gated_output
    from chela.ops.testing import values_and_gradients
    from chela.training.precompile import would_compile

    seed = torch.tensor(5)
    inputs_of: Any
    op: Any
    if name == "feed_forward":
        inputs_of, op = lambda t: random_inputs.feed_forward_inputs(2, t, d=128, f=256, **HALF), feed_forward
        op = functools.partial(op, norm="layer", dropout=0.1, seed=seed)
    elif name == "batch_norm":
        inputs_of, op = lambda t: random_inputs.batch_norm_inputs(2, t, d=128, **HALF), lambda **x: batch_norm(**x)[0]
    elif name == "gated_output":
        inputs_of, op = lambda t: random_inputs.gated_output_inputs(2, t, d=128, v=256, **HALF), gated_output
        op = functools.partial(op, heads=1, dropout=0.1, seed=seed)
    elif name == "linear_attention":
        inputs_of, op = lambda t: random_inputs.linear_attention_inputs(2, t, 1, 64, 256, **HALF), ops.linear_attention
    elif name == "long_conv":
        inputs_of, op = lambda t: random_inputs.long_conv_inputs(2, t, 128, 4096, reverse=4095, **HALF), ops.long_conv
        op = functools.partial(op, causal=False)
    else:
        inputs_of, op = lambda t: random_inputs.short_conv_inputs(2, t, 128, 4, **HALF), ops.short_conv
    met: set[tuple[int, str]] = set()
    counts = []
    few = [1, 2, 16, 17, 64, 500, 1500, 1900, 2048, 4096]
    for length in [*few, *range(33, 4096, 102)][:50]:
        inputs = inputs_of(length)
        wanted = would_compile(functools.partial(values_and_gradients, op, inputs))
        met |= {(id(kernel), how) for kernel, how in wanted}
        counts.append(len(met))
    return counts


def room_census(capability: int) -> dict[str, dict[str, int]]:
    """Bytes of shared memory of every kernel that the ops launch at the shapes that take most, by case.

    A GPU that is roomy takes the widest rows; on another one the widest are those that its plans take.
    """
    from chela import ops
    from chela.ops import random_inputs as draw
    from chela.ops.feed_forward import feed_forward, widest
    from chela.ops.gated_output import gated_output
    from chela.ops.testing import values_and_gradients
    from chela.training.precompile import would_compile

    seed, cpu = torch.tensor(5), torch.device("cpu")
    cases: dict[str, tuple[Any, dict[str, Any]]] = {}
    for kind, gated in (("mlp", False), ("swiglu", True)):
        for dtype in (torch.bfloat16, torch.float32):
            if d := widest(dtype, cpu, gated=gated):
                op = functools.partial(feed_forward, norm="layer", dropout=0.1, seed=seed)
                inputs = draw.feed_forward_inputs(300, d=d, f=2 * d, gated=gated, dtype=dtype)
                cases[f"feed_forward {kind} {dtype} D {d}"] = op, inputs
    op = functools.partial(gated_output, heads=4, dropout=0.1, seed=seed)
    for dtype in (torch.bfloat16, torch.float32):
        cases[f"gated_output {dtype}"] = op, draw.gated_output_inputs(300, d=256, v=512, dtype=dtype)
    op = functools.partial(gated_output, dropout=0.1, seed=seed)  # one head, in one chunk and in several
    cases |= {f"gated_output V {v}": (op, draw.gated_output_inputs(300, d=64, v=v)) for v in (32, 128)}
    for dtype in (torch.bfloat16, torch.float32):
        inputs = draw.linear_attention_inputs(64, 300, 1, 256, 256, dtype=dtype)
        cases[f"linear_attention {dtype}"] = ops.linear_attention, inputs
        inputs = draw.linear_attention_inputs(1, 9000, 2, 256, 512, decay=True, dtype=dtype)  # split in time
        cases[f"linear_attention with a decay {dtype}"] = ops.linear_attention, inputs
        for value in (64, 256, 512, 1024):  # as many columns of a state are held as there is room for
            inputs = draw.linear_attention_inputs(8, 300, 1, min(value, 256), value, dtype=dtype)
            op = functools.partial(ops.linear_attention, causal=False)
            cases[f"linear_attention both ways V {value} {dtype}"] = op, inputs
    for t in (500, 8192, *(2**n for n in range(14, 21))):
        cases[f"long_conv T {t}"] = ops.long_conv, draw.long_conv_inputs(1, t, 8, t, **HALF)
    # all launches first, as a kernel that is compiled would run at the next one
    wanted = {
        case: would_compile(functools.partial(values_and_gradients, op, inputs)) for case, (op, inputs) in cases.items()
    }
    found: dict[str, dict[str, int]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for case, jobs in wanted.items():
            compiled = pool.map(lambda job: (job[0].fn.__name__, job[0].preload(job[1]).metadata.shared), jobs)
            found[case] = dict(sorted(compiled, key=lambda pair: pair[1]))
    return found


def rehearsal_census() -> dict[str, Any]:
    """What `precompile` compiles for a small run, and what a step and an evaluation then still want."""
    from triton.runtime.jit import JITFunction

    from chela.data import Batch
    from chela.models import build
    from chela.training import precompile as module
    from training_kit import make_run  # pyrefly: ignore

    run = make_run(Path("unused"), model={"layers": 2, "dropout": 0.1, "kernel_length": 16}, pad_multiple=4)
    torch.manual_seed(0)
    batch = Batch(torch.randint(1, 12, (2, 8)), torch.tensor([0, 1]), torch.ones(2, 8, dtype=torch.bool))
    with patch.object(torch.cuda, "set_device"), patch.object(JITFunction, "preload", lambda self, how: (self, how)):
        jobs = module.precompile(run, batch, torch.bfloat16)
    prepared = {(id(kernel), how) for kernel, how in (job.result() for job in jobs)}
    model = build(run.model)

    def step() -> None:
        module.add_gradients(module.Objective(model), module.pad(batch, 12, 16), 1.0, torch.bfloat16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model.eval()(batch.inputs, batch.mask)

    later = {(id(kernel), how) for kernel, how in module.would_compile(step)}
    kernel, how = next(job.result() for job in jobs if job.result()[0].fn.__name__ == "fold")
    compiled = [kernel.device_caches[0][0] for kernel, _ in (job.result() for job in jobs)]
    none = not any(compiled)
    kernel.preload(how)
    return {
        "prepared": len(prepared),
        "later": len(later),
        "missed": len(later - prepared),
        "nothing was compiled": none,
        "found by its key": json.loads(how)["key"] in kernel.device_caches[0][0],
    }


@functools.cache
def census(name: str) -> Any:
    """The census of an op's name, "rehearsal" or "room", by a process of its own: Triton's interpreter is not in it.

    "room 80" is that of a GPU of compute capability 8.0.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, *name.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    wanted, *more = sys.argv[1:]
    pretend(*map(int, more))
    censuses = {"rehearsal": rehearsal_census, "room": functools.partial(room_census, *map(int, more))}
    print(json.dumps(censuses[wanted]() if wanted in censuses else lengths_census(wanted)))
