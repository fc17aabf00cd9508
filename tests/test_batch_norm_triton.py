"""The Triton implementation of batch norm: in Triton's interpreter without a GPU, on it with one."""

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from chela.ops.batch_norm import batch_norm
from chela.ops.random_inputs import batch_norm_inputs
from chela.ops.testing import check_op, relative_error, values_and_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
inputs_of = functools.partial(batch_norm_inputs, device=DEVICE)


def of(impl, **options):
    """The rows alone: no gradient flows through the moments."""
    return lambda **inputs: batch_norm(**inputs, impl=impl, **options)[0]


def check(inputs, mask=None, **options):
    run, plain = (of(impl, mask=mask, **options) for impl in ("triton", "reference"))
    return check_op(run, plain, inputs)


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 1030])
@pytest.mark.parametrize("masked", [True, False])
def test_values_and_gradients_are_within_the_budget(rows, masked, nan_memory):
    mask = torch.arange(rows, device=DEVICE) % 3 > 0 if masked and rows > 2 else None
    check(inputs_of(rows, d=24), mask)


@pytest.mark.parametrize("d", [1, 3, 64, 130, 1024])
def test_any_width(d, nan_memory):
    check(inputs_of(2, 21, d=d), torch.arange(21, device=DEVICE) < torch.tensor([[21], [7]], device=DEVICE))


@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_is_within_the_budget(dtype, nan_memory):
    inputs = inputs_of(3, 67, d=24, dtype=dtype)
    actual = values_and_gradients(of("triton"), inputs)
    assert actual["out"].dtype == actual["grad x"].dtype == dtype
    assert actual["grad weight"].dtype == actual["grad bias"].dtype == torch.float32
    check(inputs)
    wide = {**inputs, "x": inputs["x"].float()}
    assert values_and_gradients(of("triton", dtype=dtype), wide)["out"].dtype == dtype
    check(wide, dtype=dtype)


@pytest.mark.gpu
def test_many_rows_in_bfloat16(nan_memory):
    check(inputs_of(37, 1009, d=128, dtype=torch.bfloat16))


def test_moments_are_the_reference_s():
    inputs = inputs_of(300, d=24)
    inputs["x"] += 1000
    mask = torch.arange(300, device=DEVICE) < 200
    moments = batch_norm(**inputs, mask=mask, impl="triton")[1]
    exact = batch_norm(**{name: x.double() for name, x in inputs.items()}, mask=mask, impl="reference")[1]
    assert relative_error(moments.variance, exact.variance) < 1e-5
    assert relative_error(moments.mean, exact.mean) < 1e-6
    assert moments.count == exact.count == 200


def test_means_far_from_zero_keep_their_digits():
    """Of several programs, each of many rows: no more is lost than the mean itself is rounded by."""
    inputs = inputs_of(5000, d=24)
    inputs["x"] += 1000
    mean = batch_norm(**inputs, impl="triton")[1].mean
    exact = inputs["x"].double().mean(0)
    assert (mean - exact).abs().max() <= torch.finfo(torch.float32).eps * 512  # one place of 1,000


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_any_layout(layout, nan_memory):
    check(inputs_of(2, 21, d=24, layout=layout))


def test_two_runs_give_the_same_bits():
    inputs = inputs_of(3000, d=24)
    first, second = (values_and_gradients(of("triton"), inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_row_and_no_row_that_counts(nan_memory):
    inputs = inputs_of(2, 0, d=10)
    for name, value in values_and_gradients(of("triton"), inputs).items():
        assert value.shape == (inputs[name.removeprefix("grad ")].shape if name != "out" else (2, 0, 10))
        assert not value.any(), name
    results = values_and_gradients(
        of("triton", mask=torch.zeros(40, dtype=torch.bool, device=DEVICE)), inputs_of(40, d=10)
    )
    assert all(value.isfinite().all() for value in results.values())


def test_autocast_changes_nothing():
    inputs = inputs_of(33, d=24)
    expected = values_and_gradients(of("triton"), inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = values_and_gradients(of("triton"), inputs)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("masked", [True, False])
def test_ops_are_registered_as_torch_wants_them(masked):
    from chela.ops.batch_norm import fused  # noqa: F401 (registers them)

    x, weight, bias = (leaf.requires_grad_() for leaf in inputs_of(20, d=10).values())
    mask = torch.arange(20, device=DEVICE) < 13 if masked else None
    op: Any = torch.ops.chela.batch_norm.default
    torch.library.opcheck(op, (x, weight, bias, mask, 1e-5, torch.float32))
    y, moments = op(x.detach(), weight.detach(), bias.detach(), mask, 1e-5, torch.float32)
    sums: Any = torch.ops.chela.batch_norm_sums.default
    torch.library.opcheck(sums, (y, x.detach(), moments, 1e-5))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_without_graph_breaks(backend):
    op, inputs = of("triton", mask=torch.arange(20, device=DEVICE) < 13), inputs_of(20, d=10)
    compiled = torch.compile(op, fullgraph=True, backend=backend)
    actual, expected = values_and_gradients(compiled, inputs), values_and_gradients(op, inputs)
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= 1e-6, name


def test_what_the_kernels_cannot_do_is_refused_in_one_line():
    with pytest.raises(ValueError, match="keep sums in float32: for float64 use impl='reference'"):
        batch_norm(**inputs_of(9, d=10, dtype=torch.float64), impl="triton")
    with pytest.raises(ValueError, match="at most D = 1024 and x has 1025: use impl='reference'"):
        batch_norm(**inputs_of(9, d=1025), impl="triton")
    leaves = {name: leaf.requires_grad_() for name, leaf in inputs_of(9, d=10).items()}
    (dx,) = torch.autograd.grad(of("triton")(**leaves).square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative: use impl='reference'"):
        dx.sum().backward()


@pytest.mark.gpu
def test_rows_too_wide_for_the_kernels_run_all_the_same():
    run = functools.partial(batch_norm, **inputs_of(9, d=1100))
    assert torch.equal(*(run(impl=impl)[0] for impl in ("auto", "reference")))
