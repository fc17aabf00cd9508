"""`chela doctor --selftest`: every op with kernels against float64 on this machine, values, states and all gradients.

On a GPU the Triton kernels are tested, in bfloat16 where the GPU has it; without one the reference, in float32. Inputs
and limits are those of `chela.ops.testing`: the error that an op may have is computed, not chosen.
"""

import contextlib
import functools
import re
import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from chela.ops import linear_attention, linear_attention_step, long_conv, short_conv
from chela.ops.batch_norm import batch_norm
from chela.ops.feed_forward import feed_forward
from chela.ops.gated_output import gated_output
from chela.ops.impl import WITH_TRITON, Impl
from chela.ops.linear_attention.reference import bidirectional, chunked
from chela.ops.long_conv.fourier import fft_conv
from chela.ops.long_conv.reference import direct
from chela.ops.random_inputs import (
    batch_norm_inputs,
    feed_forward_inputs,
    gated_output_inputs,
    linear_attention_inputs,
    long_conv_inputs,
    short_conv_inputs,
)
from chela.ops.short_conv import reference
from chela.ops.testing import check_op, values_and_gradients
from chela.training.precompile import begin, would_compile

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Case:
    """One op, one way to call it, and one shape."""

    op: str
    """As in `WITH_TRITON`."""
    what: str
    make: Callable[[torch.dtype, torch.device], Inputs]
    run: Callable[..., Outputs]
    """From an implementation's name, `impl=`, and the inputs by name to the outputs."""
    plain: Callable[..., Outputs]
    """The same in plain torch, in the precision of its inputs."""


def _attention(what: str, *sizes: int, causal: bool = True, **parts: bool) -> Case:
    def plain(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, decay: Tensor | None = None) -> Outputs:
        if not causal:
            return bidirectional(q, k, v), None
        return chunked(
            q, k, v, None if state is None else state.to(q.dtype), None if decay is None else decay.to(q.dtype)
        )

    return Case(
        "linear_attention",
        f"{what}, {_shape('BTHKV', sizes)}",
        lambda dtype, device: linear_attention_inputs(*sizes, dtype=dtype, device=device, **parts),
        lambda **inputs: linear_attention(**inputs, causal=causal, return_state=causal),
        plain,
    )


def _attention_step(*sizes: int) -> Case:
    def make(dtype: torch.dtype, device: torch.device) -> Inputs:
        batch, heads, key, value = sizes
        inputs = linear_attention_inputs(
            batch, 1, heads, key, value, decay=True, state=True, dtype=dtype, device=device
        )
        return inputs | {name: inputs[name].squeeze(1) for name in "qkv"}

    def plain(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> Outputs:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        out, after = chunked(q, k, v, state.to(q.dtype), decay.to(q.dtype))
        return out.squeeze(1), after

    what = f"one step, decay, {_shape('BHKV', sizes)}"
    return Case("linear_attention", what, make, linear_attention_step, plain)


def _short(*sizes: int) -> Case:
    def plain(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Outputs:
        padded = torch.cat([state, x], dim=1)
        return F.silu(reference.plain(padded, weight, bias)), padded[:, x.shape[1] :]

    return Case(
        "short_conv",
        f"causal, SiLU, {_shape('BTDW', sizes)}",
        lambda dtype, device: short_conv_inputs(*sizes, state=True, dtype=dtype, device=device),
        lambda **inputs: short_conv(**inputs, activation="silu", return_state=True),
        plain,
    )


def _long(*sizes: int) -> Case:
    def plain(x: Tensor, kernel: Tensor) -> Outputs:
        sums = x.dtype != torch.float32 and x.shape[1] <= 8192  # a transform's rounding is no sum's; long sums last
        form = direct if sums else fft_conv
        return (form(x, kernel.to(x.dtype), kernel[:, :0].to(x.dtype), x.shape[1]),)

    return Case(
        "long_conv",
        f"causal, {_shape('BTDL', sizes)}",
        lambda dtype, device: long_conv_inputs(*sizes, dtype=dtype, device=device),
        lambda **inputs: long_conv(**inputs)[:1],
        plain,
    )


def _feed_forward(rows: int, d: int, f: int, *, gated: bool = False) -> Case:
    def run(impl: Impl = "reference", **inputs: Any) -> Outputs:
        seed = torch.tensor(5, device=inputs["x"].device)
        options: dict[str, Any] = {"norm": "layer", "bounded": gated, "dropout": 0.1, "seed": seed, "impl": impl}
        return (feed_forward(**inputs, **options),)

    return Case(
        "feed_forward",
        f"{'bounded SwiGLU' if gated else 'MLP'}, dropout, {_shape('NDF', (rows, d, f))}",
        lambda dtype, device: feed_forward_inputs(rows, d=d, f=f, gated=gated, dtype=dtype, device=device),
        run,
        run,
    )


def _gated(rows: int, d: int, v: int) -> Case:
    def run(
        m: Tensor,
        mixed: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        gain: Tensor,
        impl: Impl = "reference",
    ) -> Outputs:
        seed = torch.tensor(5, device=m.device)
        return (gated_output(m, mixed, residual, weight, bias, gain=gain, dropout=0.1, seed=seed, impl=impl),)

    return Case(
        "gated_output",
        f"norm, dropout, {_shape('NDV', (rows, d, v))}",
        lambda dtype, device: gated_output_inputs(rows, d=d, v=v, dtype=dtype, device=device),
        run,
        run,
    )


def _batch_norm(rows: int, d: int) -> Case:
    def run(x: Tensor, weight: Tensor, bias: Tensor, impl: Impl = "reference") -> Outputs:
        mask = torch.arange(rows, device=x.device) % 5 > 0
        return (batch_norm(x, weight, bias, mask=mask, impl=impl)[0],)

    return Case(
        "batch_norm",
        f"padding, {_shape('ND', (rows, d))}",
        lambda dtype, device: batch_norm_inputs(rows, d=d, dtype=dtype, device=device),
        run,
        run,
    )


def _shape(axes: str, sizes: tuple[int, ...]) -> str:
    return " ".join(f"{axis}{size}" for axis, size in zip(axes, sizes, strict=True))


CASES: dict[str, tuple[Case, ...]] = {
    "cpu": (
        _attention("causal", 2, 193, 3, 24, 40, state=True),
        _attention("causal, decay", 2, 193, 3, 24, 40, state=True, decay=True),
        _attention("both directions", 2, 193, 3, 24, 40, causal=False),
        _attention_step(2, 3, 24, 40),
        _short(2, 193, 24, 4),
        _long(2, 193, 24, 193),
        _feed_forward(193, 24, 80),
        _feed_forward(193, 24, 80, gated=True),
        _gated(193, 24, 40),
        _batch_norm(193, 24),
    ),
    "cuda": (
        _attention("causal", 2, 1000, 3, 64, 64, state=True),
        _attention("causal", 1, 16_411, 1, 64, 256, state=True),
        _attention("causal, decay", 2, 1000, 3, 64, 64, state=True, decay=True),
        _attention("causal, decay", 1, 16_411, 1, 64, 256, state=True, decay=True),
        _attention("both directions", 1, 4099, 2, 64, 256, causal=False),
        _attention_step(4, 8, 64, 256),
        _short(2, 4099, 128, 4),
        _long(2, 1000, 24, 1000),
        _long(9, 2048, 24, 2048),
        _long(9, 4096, 24, 4096),
        _long(1, 4099, 24, 4099),
        _long(2, 14_113, 24, 14_113),
        _feed_forward(4099, 128, 256),
        _feed_forward(4099, 128, 256, gated=True),
        _gated(4099, 128, 256),
        _batch_norm(4099, 128),
    ),
}
"""For each kind of device. On a GPU: few rows that are long, which are split over the multiprocessors, and others."""


def selftest(device: torch.device, *, write: Callable[[str], object] = print) -> int:
    """Run all cases and write a line for each.

    Args:
        device: a GPU tests the kernels, a CPU the reference.
        write: takes the lines.

    Returns:
        The number of cases that failed.
    """
    began, failures, cases = time.perf_counter(), 0, CASES[device.type]
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        impl: Impl = "triton"
        cases = tuple(case for case in cases if case.op in WITH_TRITON)
        write(f"Triton kernels on {torch.cuda.get_device_name(device)} in {_name(dtype)}, against float64:")
        _compile(cases, dtype, device)
    else:
        dtype, impl = torch.float32, "reference"
        write(f"no GPU to test kernels on: the reference on the CPU in {_name(dtype)}, against float64:")
    for case in cases:
        started = time.perf_counter()
        verdict, finding = _judge(case, impl, dtype, device)
        failures += verdict != "PASS"
        write(f"{verdict}  {case.op:<17} {case.what:<42} {finding}, {time.perf_counter() - started:.1f} s")
    write(f"{len(cases) - failures} of {len(cases)} passed, {time.perf_counter() - began:.1f} s")
    return failures


def _compile(cases: tuple[Case, ...], dtype: torch.dtype, device: torch.device) -> None:
    """All kernels side by side, which one after the other would take most of the time; what fails is found later."""

    def launch() -> None:
        for case in cases:
            with contextlib.suppress(Exception):
                values_and_gradients(functools.partial(case.run, impl="triton"), case.make(dtype, device))

    wait(begin(would_compile(launch), device))


def _judge(case: Case, impl: Impl, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    def run(**inputs: Tensor) -> Any:
        return case.run(**inputs, impl=impl)

    try:
        errors = check_op(run, case.plain, case.make(dtype, device), draws=8)
    except Exception as error:  # a compiler that stops or a launch that fails is a finding too
        said = " ".join(str(error).split())
        return "FAIL", said if isinstance(error, AssertionError) else f"{type(error).__name__}: {said:.300}"
    worst = max(errors, key=lambda name: errors[name])
    return "PASS", f"worst relative error {errors[worst]:.1e} ({worst})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def known_issues(capability: tuple[int, int] | None, triton: str) -> list[tuple[str, str]]:
    """Pairs of GPU and Triton known to be bad or untested, as (pair, what is known).

    Args:
        capability: compute capability of the GPU here, if there is one.
        triton: version installed, or an empty string.

    Returns:
        All pairs; the text begins with "this machine: " where one is at hand.
    """
    major = capability[0] if capability else 0
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", triton)
    version = tuple(map(int, numbers.groups())) if numbers else ()
    hopper = capability == (9, 0) and (3, 4, 0) <= version < (3, 7, 1)
    pairs = [
        (
            "Hopper (9.0), Triton 3.4.0 to 3.7.0",
            hopper,
            "known bad: miscompiles tl.dot(tl.trans(x), y) on an accumulator; the kernels avoid it, see --selftest",
        ),
        (
            "GPUs 8.x, 10.x, 12.x, any Triton",
            major in (8, 10, 12),
            "untested: run --selftest before relying on it",
        ),
    ]
    return [(pair, f"this machine: {text}" if here else text) for pair, here, text in pairs]
