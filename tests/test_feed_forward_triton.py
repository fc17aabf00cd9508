"""The Triton implementation of the feed-forward part: in Triton's interpreter without a GPU, on it with one."""

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from chela.ops.feed_forward import feed_forward, fused
from chela.ops.random_inputs import draw, feed_forward_inputs
from chela.ops.testing import check_op, relative_error, values_and_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORMS: list[Any] = ["layer", "rms", "scale", "batch", "none"]
TILE = 64  # rows of a tile in float32; in 16 bits there are 128
run: Any = functools.partial(feed_forward, impl="triton")
forward_op = torch.ops.chela.feed_forward.default
backward_op = torch.ops.chela.feed_forward_backward.default
inputs_of = functools.partial(feed_forward_inputs, device=DEVICE)


def seed_of(number):
    return torch.tensor(number, device=DEVICE)


def check(inputs, norm, rate=0.0, *, bounded=False):
    """A scale norm's gain has one gradient, whose plain error is a single draw: more of them make its budget."""
    options = {"norm": norm, "bounded": bounded, "dropout": rate, "seed": seed_of(5)}
    plain = functools.partial(feed_forward, impl="reference", **options)
    return check_op(functools.partial(run, **options), plain, inputs, draws=5 if norm == "scale" else 3)


on_gpu = functools.partial(pytest.param, marks=pytest.mark.gpu)  # too much for the interpreter
KINDS = pytest.mark.parametrize(("gated", "bounded"), [(False, False), (True, False), (True, True)])


@KINDS
@pytest.mark.parametrize(("rate", "residual"), [(0.0, True), (0.2, False), on_gpu(0.0, False), on_gpu(0.2, True)])
@pytest.mark.parametrize("norm", NORMS)
def test_values_and_gradients_are_within_the_budget(norm, rate, residual, gated, bounded, nan_memory):
    check(inputs_of(2, 37, d=24, f=80, norm=norm, residual=residual, gated=gated), norm, rate, bounded=bounded)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [1, on_gpu(2), TILE - 1, TILE, TILE + 1, on_gpu(2 * TILE), 5 * TILE + 3])
def test_any_number_of_rows(rows, gated, nan_memory):
    check(inputs_of(rows, d=10, f=12, gated=gated), "layer", 0.1)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("d", "f"), [(1, 1), (64, 64), (65, 130), (128, 256), (16, 600)])
def test_any_width(d, f, gated, nan_memory):
    check(inputs_of(70, d=d, f=f, norm="rms", gated=gated), "rms", 0.1)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("rate", "residual"), [(0.0, False), (0.2, True), on_gpu(0.0, True), on_gpu(0.2, False)])
@KINDS
@pytest.mark.parametrize("norm", NORMS)
def test_low_precision_is_within_the_budget(norm, gated, bounded, rate, residual, dtype, nan_memory):
    inputs = inputs_of(3, 67, d=24, f=80, norm=norm, gated=gated, residual=residual, dtype=dtype)
    check(inputs, norm, rate, bounded=bounded)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("d", "f"), [(64, 128), (128, 256), (160, 300), (256, 512)])
def test_low_precision_at_the_widths_of_the_plans(d, f, gated, dtype, nan_memory):
    check(inputs_of(133, d=d, f=f, gated=gated, dtype=dtype), "layer", 0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("rate", [0.0, 0.1])
@KINDS
def test_many_rows_in_bfloat16(gated, bounded, rate, nan_memory):
    check(inputs_of(37, 1009, d=128, f=256, gated=gated, dtype=torch.bfloat16), "layer", rate, bounded=bounded)


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_any_layout(layout, nan_memory):
    inputs = inputs_of(2, 21, d=24, f=80, residual=True, layout=layout)
    inputs["w1"], inputs["w2"] = (inputs[name].mT.contiguous().mT for name in ("w1", "w2"))
    check(inputs, "layer", 0.1)


def test_the_masks_are_the_reference_s():
    """Every hidden entry is 32 and every weight behind it 1/32: sums count what the first dropout kept, exactly."""
    seed, rows, d, f = seed_of(9), 40, 70, 130
    x = torch.zeros(rows, d, device=DEVICE)
    b1, ones = torch.full((f,), 32.0, device=DEVICE), torch.ones(d, f, device=DEVICE) / 32
    for rate in (0.5, 0.75):  # whose scales are powers of two
        outs = [
            feed_forward(x, ones.T * 0, b1, ones, x[0], dropout=rate, seed=seed, impl=impl)
            for impl in ("triton", "reference")
        ]
        assert torch.equal(*outs)
        assert abs((outs[0] == 0).double().mean() - rate) < 0.05
        assert outs[0].unique().numel() > 10


def test_low_precision_parameters_are_taken_and_give_gradients_of_their_dtype():
    inputs = {name: tensor.half() for name, tensor in inputs_of(33, d=24, f=80).items()}
    actual = values_and_gradients(functools.partial(run, norm="layer"), inputs)
    assert {value.dtype for value in actual.values()} == {torch.float16}
    check(inputs, "layer")


def test_a_residual_and_an_input_of_other_dtypes():
    inputs = inputs_of(33, d=24, f=80, residual=True, dtype=torch.float16)
    inputs["residual"] = inputs["residual"].float()
    actual = values_and_gradients(functools.partial(run, norm="layer"), inputs)
    assert actual["out"].dtype == actual["grad residual"].dtype == torch.float32
    assert actual["grad x"].dtype == torch.float16
    check(inputs, "layer", 0.1)


def test_autocast_says_what_the_products_take():
    dtype = torch.float16 if DEVICE == "cpu" else torch.bfloat16  # the interpreter's bfloat16 products are wrong
    inputs = inputs_of(33, d=24, f=80)
    low, high = (
        values_and_gradients(functools.partial(feed_forward, norm="layer", impl="reference"), x)
        for x in ({name: x.to(dtype) for name, x in inputs.items()}, {name: x.double() for name, x in inputs.items()})
    )
    with torch.autocast(DEVICE, dtype):
        actual = values_and_gradients(functools.partial(run, norm="layer"), inputs)
    for name, value in actual.items():
        assert value.dtype == torch.float32, name
        allowed = 2 * (relative_error(low[name], high[name]) + torch.finfo(dtype).eps)
        assert relative_error(value, high[name]) <= allowed, name
    assert relative_error(actual["out"], high["out"]) > 1e-5  # the products were indeed narrowed


def test_gradients_that_arrive_in_any_layout():
    inputs = inputs_of(21, d=24, f=80)
    leaves = [leaf.requires_grad_() for leaf in inputs.values()]
    out = run(**inputs, norm="layer")
    cotangent = draw(*out.shape, seed=1, device=DEVICE)
    expected = torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
    actual = torch.autograd.grad(out, leaves, cotangent.mT.contiguous().mT, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    ones = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.sum(), leaves), ones, strict=True))


def test_two_runs_give_the_same_bits():
    inputs = inputs_of(300, d=24, f=80, dtype=torch.float16)
    op = functools.partial(run, norm="layer", dropout=0.1, seed=seed_of(5))
    first, second = values_and_gradients(op, inputs), values_and_gradients(op, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("norm", NORMS)
def test_no_rows(norm, nan_memory):
    inputs = inputs_of(2, 0, d=10, f=12, norm=norm)
    for name, value in values_and_gradients(functools.partial(run, norm=norm), inputs).items():
        assert value.shape == inputs[name.removeprefix("grad ")].shape if name != "out" else (2, 0, 10)
        assert not value.any(), name


def op_arguments(norm, residual, rate, gated):
    inputs = inputs_of(20, d=10, f=12, norm=norm, residual=residual, gated=gated)
    leaves = {name: leaf.requires_grad_() for name, leaf in inputs.items()}
    names = ("x", "residual", "w1", "b1", "w2", "b2", "w3", "gain", "shift", "mean", "rstd")
    return *(leaves.get(name) for name in names), seed_of(3) if rate else None, norm, gated, rate, torch.float32


@pytest.mark.parametrize(
    ("norm", "residual", "rate", "gated"),
    [
        ("layer", False, 0.1, False),
        ("scale", True, 0, False),
        ("batch", False, 0, True),
        ("none", True, 0, False),
    ],
)
def test_ops_are_registered_as_torch_wants_them(norm, residual, rate, gated):
    arguments = op_arguments(norm, residual, float(rate), gated)
    torch.library.opcheck(forward_op, arguments)
    x, _, *others = (a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.library.opcheck(backward_op, (draw(20, 10, seed=1, device=DEVICE), x, not residual, *others))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_without_graph_breaks(backend):
    inputs = inputs_of(20, d=10, f=12)
    op = functools.partial(run, norm="layer", dropout=0.1, seed=seed_of(3))
    compiled = torch.compile(op, fullgraph=True, backend=backend)
    actual, expected = values_and_gradients(compiled, inputs), values_and_gradients(op, inputs)
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= 1e-6, name


def test_a_second_derivative_is_refused():
    leaves = {name: leaf.requires_grad_() for name, leaf in inputs_of(9, d=10, f=12).items()}
    (dx,) = torch.autograd.grad(run(**leaves, norm="layer").square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative: use impl='reference'"):
        dx.sum().backward()


def test_what_the_kernels_cannot_do_is_refused_in_one_line():
    with pytest.raises(ValueError, match="keep sums in float32: for float64 use impl='reference'"):
        run(**inputs_of(9, d=10, f=12, dtype=torch.float64), norm="layer")
    with pytest.raises(
        ValueError, match=r"at most D = 128 with products of torch\.float32 on this device, and x has 129"
    ):
        run(**inputs_of(9, d=129, f=12), norm="layer")
    with pytest.raises(
        ValueError, match=r"at most D = 256 with products of torch\.float16 on this device, and x has 257"
    ):
        run(**inputs_of(9, d=257, f=12, dtype=torch.float16), norm="layer")


@pytest.mark.gpu
def test_rows_too_wide_for_the_kernels_run_all_the_same():
    inputs = inputs_of(9, d=260, f=12)
    auto, reference = (feed_forward(**inputs, norm="layer", impl=impl) for impl in ("auto", "reference"))
    assert torch.equal(auto, reference)


def test_plans_cover_every_width():
    for itemsize, widest in ((2, 256), (4, 128)):
        assert [*fused.PLANS[itemsize]] == [width for width in (64, 128, 256) if width <= widest]
        assert fused.GATED_PLANS[itemsize].keys() == fused.PLANS[itemsize].keys()
        for plan in (*fused.PLANS[itemsize].values(), *fused.GATED_PLANS[itemsize].values()):
            assert all(tile.hidden % 64 == 0 for tile in plan)
