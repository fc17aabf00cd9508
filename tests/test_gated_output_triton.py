"""The Triton implementation of the gated output: in Triton's interpreter without a GPU, on it with one."""

import functools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from chela.ops import launch
from chela.ops.gated_output import WIDEST, fused, gated_output, gated_output_with_moments
from chela.ops.random_inputs import draw, gated_output_inputs
from chela.ops.testing import check_op, relative_error, values_and_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = 64  # rows of the largest tile, and of a program of the gate at 128 channels
run: Any = functools.partial(gated_output, impl="triton")
forward_op = torch.ops.chela.gated_output.default
backward_op = torch.ops.chela.gated_output_backward.default
inputs_of = functools.partial(gated_output_inputs, device=DEVICE)
LOW = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def seed_of(number):
    return torch.tensor(number, device=DEVICE)


def check(inputs, rate=0.0, heads=1, draws=3):
    """A gradient with a handful of entries has a plain error of few draws: more cotangents make its budget."""
    options = {"heads": heads, "dropout": rate, "seed": seed_of(5)}
    plain = functools.partial(gated_output, impl="reference", **options)
    return check_op(functools.partial(run, **options), plain, inputs, draws=draws)


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize(("bias", "gain"), [(True, True), (False, True), (True, False), (False, False)])
def test_values_and_gradients_are_within_the_budget(bias, gain, heads, rate, nan_memory):
    check(inputs_of(3, 67, d=24, v=80, bias=bias, gain=gain), rate, heads)


def with_moments(impl, mask, **options):
    def op(**inputs):
        y, moments = gated_output_with_moments(**inputs, mask=mask, impl=impl, **options)
        return y, moments.mean, moments.variance

    return op


def check_moments(inputs, mask, rate=0.0):
    options = {"dropout": rate, "seed": seed_of(5)}
    op = with_moments("triton", mask, **options)
    check_op(op, with_moments("reference", mask, **options), inputs)
    first, second = values_and_gradients(op, inputs), values_and_gradients(op, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 2 * TILE + 3])
@pytest.mark.parametrize("masked", [False, True])
def test_moments_are_within_the_budget(rows, masked, nan_memory):
    mask = (torch.arange(rows, device=DEVICE) % 3 > 0) | (torch.arange(rows, device=DEVICE) == 0) if masked else None
    check_moments(inputs_of(rows, d=70, v=12), mask, 0.2)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("residual", [None, torch.float32])
def test_moments_in_low_precision(residual, dtype, nan_memory, monkeypatch):
    """Their gradients meet an output made again from what was kept, rounded; so the plain one rounds it, too."""
    silu = F.silu
    monkeypatch.setattr(F, "silu", lambda x: silu(x.to(dtype).float() if x.dtype == torch.float32 else x))
    lengths = torch.tensor([[67], [40], [0]], device=DEVICE)
    mask = torch.arange(67, device=DEVICE) < lengths  # tiles without a row that counts
    check_moments(inputs_of(3, 67, d=24, v=80, dtype=dtype, residual_dtype=residual), mask, 0.1)


def test_moments_of_channels_far_from_zero():
    """Squares are of differences: what float32 keeps of a channel's spread, the variance has."""
    inputs = inputs_of(300, d=24, v=80)
    inputs["residual"] += 1000
    moments, exact = (
        gated_output_with_moments(**x, impl=impl)[1]
        for impl, x in (("triton", inputs), ("reference", {name: x.double() for name, x in inputs.items()}))
    )
    assert relative_error(moments.variance, exact.variance) < 1e-5
    assert relative_error(moments.mean, exact.mean) < 1e-6
    assert moments.count == exact.count == 300


def test_moments_without_a_row_that_counts():
    inputs = inputs_of(40, d=24, v=80)
    op = with_moments("triton", torch.zeros(40, dtype=torch.bool, device=DEVICE))
    results = values_and_gradients(op, inputs)
    assert not results["state"].any()
    assert not results["output 2"].any()
    plain = values_and_gradients(lambda **x: op(**x)[0], inputs)
    assert all(torch.equal(results[name], value) for name, value in plain.items())


def test_gradients_of_moments_alone():
    inputs = inputs_of(40, d=24, v=80)

    def variance(impl, **inputs):
        return with_moments(impl, None)(**inputs)[2]

    check_op(functools.partial(variance, "triton"), functools.partial(variance, "reference"), inputs)


@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, TILE - 1, TILE, TILE + 1, 2 * TILE, 5 * TILE + 3])
def test_any_number_of_rows(rows, nan_memory):
    check(inputs_of(rows, d=24, v=80), 0.1)


def test_more_rows_than_shares_of_one_tile(nan_memory):
    rows = 32 * fused.SHARES + 65  # a share has two tiles, the last share less
    check(inputs_of(rows, d=3, v=4), 0.1, draws=5)


@pytest.mark.parametrize(
    ("d", "v", "heads"),
    [(1, 1, 1), (1, 2, 1), (64, 64, 1), (65, 130, 1), (65, 140, 2), (128, 256, 1), (16, 600, 4), (160, 96, 3)],
)
def test_any_width(d, v, heads, nan_memory):
    # the norm of a single column is its sign, and its gradient nothing but rounding
    check(inputs_of(37, d=d, v=v, gain=v > heads), 0.1, heads, draws=5)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("residual", [None, torch.float32])
@pytest.mark.parametrize(("rate", "heads"), [(0.0, 1), (0.2, 1), (0.2, 4)])
def test_low_precision_is_within_the_budget(rate, heads, residual, dtype, nan_memory):
    inputs = inputs_of(3, 67, d=24, v=80, dtype=dtype, residual_dtype=residual)
    actual = values_and_gradients(run, inputs)
    assert actual["out"].dtype == actual["grad residual"].dtype == (residual or dtype)
    assert actual["grad m"].dtype == actual["grad mixed"].dtype == dtype
    assert actual["grad weight"].dtype == actual["grad gain"].dtype == torch.float32
    check(inputs, rate, heads)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("d", "v"), [(64, 128), (128, 256), (160, 320), (256, 512)])
def test_low_precision_at_the_widths_of_the_plans(d, v, dtype, nan_memory):
    check(inputs_of(67, d=d, v=v, dtype=dtype), 0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_many_rows_in_bfloat16(rate, nan_memory):
    check(inputs_of(37, 1009, d=128, v=256, dtype=torch.bfloat16, residual_dtype=torch.float32), rate)


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_any_layout(layout, nan_memory):
    inputs = inputs_of(2, 21, d=24, v=80, layout=layout)
    inputs["weight"] = inputs["weight"].mT.contiguous().mT
    for name in ("bias", "gain"):
        inputs[name] = inputs[name].repeat_interleave(2)[::2]
    check(inputs, 0.1)


def test_parts_of_a_wider_product_are_not_copied():
    wide = draw(2, 9, 7 + 12 + 2 * 10, seed=0, device=DEVICE)
    part = wide[..., 7:]
    assert launch.rows(part).data_ptr() == part.data_ptr()


def test_the_masks_are_the_reference_s():
    """Where the gate is open and h is large, an entry is zero if and only if it was dropped."""
    inputs = inputs_of(40, d=70, v=12)
    inputs["mixed"][:, 12:] = 200.0
    for rate in (0.1, 0.75):
        outs = [gated_output(**inputs, dropout=rate, seed=seed_of(9), impl=impl) for impl in ("triton", "reference")]
        assert torch.equal(outs[0] == 0, outs[1] == 0)
        assert abs((outs[0] == 0).double().mean() - rate) < 0.05


def test_low_precision_parameters_are_taken_and_give_gradients_of_their_dtype():
    inputs = {name: tensor.half() for name, tensor in inputs_of(33, d=24, v=80).items()}
    assert {value.dtype for value in values_and_gradients(run, inputs).values()} == {torch.float16}
    check(inputs)


def test_autocast_changes_nothing():
    inputs = inputs_of(33, d=24, v=80)
    expected = values_and_gradients(run, inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = values_and_gradients(run, inputs)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_gradients_that_arrive_in_any_layout():
    inputs = inputs_of(21, d=24, v=80)
    leaves = [leaf.requires_grad_() for leaf in inputs.values()]
    out = run(**inputs)
    cotangent = draw(*out.shape, seed=1, device=DEVICE)
    expected = torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
    actual = torch.autograd.grad(out, leaves, cotangent.mT.contiguous().mT, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    ones = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.sum(), leaves), ones, strict=True))


def test_two_runs_give_the_same_bits():
    inputs = inputs_of(300, d=24, v=80, dtype=torch.float16)
    op = functools.partial(run, dropout=0.1, seed=seed_of(5))
    first, second = values_and_gradients(op, inputs), values_and_gradients(op, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_row_depends_on_no_other():
    inputs = inputs_of(70, d=24, v=80)
    op = functools.partial(run, dropout=0.1, seed=seed_of(5))
    out = op(**inputs)
    for name in ("m", "mixed", "residual"):
        inputs[name][:33] = float("nan")
    assert torch.equal(op(**inputs)[33:], out[33:])


def test_without_gradients_nothing_is_kept():
    tensors = [*inputs_of(33, d=24, v=80).values()]
    out, _, *kept = forward_op(*tensors, None, None, 1, 0.0, True, False)
    assert all(not tensor.numel() for tensor in kept)
    assert torch.equal(out, forward_op(*tensors, None, None, 1, 0.0, True, True)[0])


def test_no_rows(nan_memory):
    inputs = inputs_of(2, 0, d=10, v=12)
    for name, value in values_and_gradients(run, inputs).items():
        assert value.shape == (inputs[name.removeprefix("grad ")].shape if name != "out" else (2, 0, 10))
        assert not value.any(), name


@pytest.mark.parametrize(("bias", "gain", "rate"), [(True, True, 0.1), (False, False, 0.0)])
@pytest.mark.parametrize("moments", [False, True])
def test_ops_are_registered_as_torch_wants_them(moments, bias, gain, rate):
    leaves = {name: leaf.requires_grad_() for name, leaf in inputs_of(20, d=10, v=12, bias=bias, gain=gain).items()}
    tensors = [leaves.get(name) for name in ("m", "mixed", "residual", "weight", "bias", "gain")]
    mask = torch.arange(20, device=DEVICE) < 13 if moments else None
    arguments = (*tensors, mask, seed_of(3) if rate else None, 2, rate)
    torch.library.opcheck(forward_op, (*arguments, moments, True))
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    _, *kept = forward_op(*detached, moments, True)
    dy, dmoments = (draw(rows, 10, seed=rows, device=DEVICE) for rows in (20, 3))
    torch.library.opcheck(backward_op, (dy, dmoments if moments else None, *kept, *detached))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_without_graph_breaks(backend):
    inputs = inputs_of(20, d=10, v=12)
    op = functools.partial(run, heads=2, dropout=0.1, seed=seed_of(3))
    compiled = torch.compile(op, fullgraph=True, backend=backend)
    actual, expected = values_and_gradients(compiled, inputs), values_and_gradients(op, inputs)
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= 1e-6, name
    with torch.no_grad():
        assert relative_error(compiled(**inputs), op(**inputs)) <= 1e-6


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_moments_compile_without_graph_breaks(backend):
    op = with_moments("triton", torch.arange(20, device=DEVICE) < 13)
    inputs = inputs_of(20, d=10, v=12)
    compiled = torch.compile(op, fullgraph=True, backend=backend)
    actual, expected = values_and_gradients(compiled, inputs), values_and_gradients(op, inputs)
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= 1e-6, name


def test_a_second_derivative_is_refused():
    leaves = {name: leaf.requires_grad_() for name, leaf in inputs_of(9, d=10, v=12).items()}
    (dm,) = torch.autograd.grad(run(**leaves).square().sum(), leaves["m"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative: use impl='reference'"):
        dm.sum().backward()


def test_what_the_kernels_cannot_do_is_refused_in_one_line():
    with pytest.raises(ValueError, match="keep sums in float32: for float64 use impl='reference'"):
        run(**inputs_of(9, d=10, v=12, dtype=torch.float64))
    with pytest.raises(ValueError, match="at most D = 256 and weight has 257: use impl='reference'"):
        run(**inputs_of(9, d=257, v=12))


@pytest.mark.gpu
def test_rows_too_wide_for_the_kernels_run_all_the_same():
    inputs = inputs_of(9, d=260, v=12)
    assert torch.equal(*(gated_output(**inputs, impl=impl) for impl in ("auto", "reference")))


def test_plans_cover_every_width():
    for plans in fused.WEIGHT.values():
        assert max(plans) == WIDEST
