"""The Triton implementation of shared attention: in Triton's interpreter without a GPU, on it with one."""

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from chela.ops.linear_attention import plan
from chela.ops.random_inputs import draw, shared_attention_inputs
from chela.ops.shared_attention import WIDEST, fused, shared_attention
from chela.ops.testing import check_op, relative_error, values_and_gradients
from test_shared_attention import rounding, some  # pyrefly: ignore

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = 64  # the largest number of tokens of a tile
run: Any = functools.partial(shared_attention, impl="triton")
assert fused  # registers the ops
forward_op = torch.ops.chela.shared_attention.default
backward_op = torch.ops.chela.shared_attention_backward.default
inputs_of: Any = functools.partial(shared_attention_inputs, device=DEVICE)
LOW = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def check(inputs, mask=None, scale=0.5):
    return check_op(
        functools.partial(run, mask=mask, scale=scale), functools.partial(rounding, mask=mask, scale=scale), inputs
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_values_and_gradients_are_within_the_budget(heads, masked, nan_memory):
    check(inputs_of(3, 67, heads, 24, 80), some(3, 67, DEVICE) if masked else None)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, TILE - 1, TILE, TILE + 1, 5 * TILE + 3])
def test_any_length(length, nan_memory):
    check(inputs_of(2, length, 1, 24, 80), some(2, length, DEVICE))


@pytest.mark.parametrize(
    ("heads", "key", "value"), [(1, 1, 1), (2, 3, 10), (1, 16, 32), (1, 65, 130), (4, 64, 64), (1, WIDEST, 256)]
)
def test_any_width(heads, key, value, nan_memory):
    check(inputs_of(2, 37, heads, key, value), some(2, 37, DEVICE))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("heads", "key", "value"), [(1, 24, 80), (2, 24, 80), (1, 64, 256), (1, WIDEST, 320)])
def test_low_precision_is_within_the_budget(heads, key, value, dtype, nan_memory):
    inputs = inputs_of(2, 133, heads, key, value, dtype=dtype)
    actual = values_and_gradients(run, inputs)
    assert actual["out"].dtype == actual["grad shared"].dtype == actual["grad values"].dtype == dtype
    assert actual["grad q_gain"].dtype == actual["grad k_bias"].dtype == torch.float32
    check(inputs, some(2, 133, DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "length"), [(64, 2048), (3, 4099), (1, 65_537)])
def test_many_tokens_in_bfloat16(batch, length, nan_memory):
    check(inputs_of(batch, length, 1, 64, 256, dtype=torch.bfloat16), some(batch, length, DEVICE))


def test_rows_too_few_to_fill_a_gpu_are_split_in_time(monkeypatch, nan_memory):
    monkeypatch.setattr(plan, "multiprocessors", lambda device: 7)
    check(inputs_of(1, 9 * TILE + 5, 2, 24, 80), some(1, 9 * TILE + 5, DEVICE))


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_any_layout(layout, nan_memory):
    inputs = inputs_of(2, 21, 2, 24, 80, layout=layout)
    for name in ("q_gain", "q_bias", "k_gain", "k_bias"):
        inputs[name] = inputs[name].mT.contiguous().mT
    check(inputs)


def test_masked_tokens_are_seen_by_none_whatever_they_hold():
    inputs, mask = inputs_of(2, 70, 1, 24, 80), some(2, 70, DEVICE)
    before = values_and_gradients(functools.partial(run, mask=mask), inputs)
    for name in ("shared", "values"):
        inputs[name][~mask] = draw(*inputs[name].shape, seed=99, device=DEVICE)[~mask]
    after = values_and_gradients(functools.partial(run, mask=mask), inputs)
    assert torch.equal(after["out"][mask], before["out"][mask])
    assert not before["grad values"][~mask].any()
    none = run(**inputs, mask=torch.zeros_like(mask))
    assert not none.any()


def test_low_precision_parameters_are_taken_and_give_gradients_of_their_dtype():
    inputs = {name: tensor.half() for name, tensor in inputs_of(2, 33, 2, 24, 80).items()}
    assert {value.dtype for value in values_and_gradients(run, inputs).values()} == {torch.float16}
    check(inputs)


def test_autocast_changes_nothing():
    inputs = inputs_of(2, 33, 2, 24, 80)
    expected = values_and_gradients(run, inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = values_and_gradients(run, inputs)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_gradients_that_arrive_in_any_layout():
    inputs = inputs_of(2, 21, 2, 24, 80)
    leaves = [leaf.requires_grad_() for leaf in inputs.values()]
    out = run(**inputs)
    cotangent = draw(*out.shape, seed=1, device=DEVICE)
    expected = torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
    actual = torch.autograd.grad(out, leaves, cotangent.mT.contiguous().mT, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    ones = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.sum(), leaves), ones, strict=True))


def test_two_runs_give_the_same_bits():
    inputs = inputs_of(2, 300, 2, 24, 80, dtype=torch.float16)
    first, second = values_and_gradients(run, inputs), values_and_gradients(run, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("sizes", [(0, 5), (2, 0)])
def test_no_tokens(sizes, nan_memory):
    for name, value in values_and_gradients(run, inputs_of(*sizes, 2, 10, 12)).items():
        assert not value.any(), name


@pytest.mark.parametrize("masked", [False, True])
def test_ops_are_registered_as_torch_wants_them(masked):
    leaves = [leaf.requires_grad_() for leaf in inputs_of(2, 20, 2, 10, 12).values()]
    rest = some(2, 20, DEVICE) if masked else None, 0.5
    torch.library.opcheck(forward_op, (*leaves, *rest))
    leaves = [leaf.detach() for leaf in leaves]
    out, state = forward_op(*leaves, *rest)
    torch.library.opcheck(backward_op, (draw(*out.shape, seed=7, device=DEVICE), state, *leaves, *rest))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_without_graph_breaks(backend):
    inputs, op = inputs_of(2, 20, 2, 10, 12), functools.partial(run, mask=some(2, 20, DEVICE))
    compiled = torch.compile(op, fullgraph=True, backend=backend)
    actual, expected = values_and_gradients(compiled, inputs), values_and_gradients(op, inputs)
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= 1e-6, name
    with torch.no_grad():
        assert relative_error(compiled(**inputs), op(**inputs)) <= 1e-6


def test_a_second_derivative_is_refused():
    leaves = {name: leaf.requires_grad_() for name, leaf in inputs_of(1, 9, 1, 10, 12).items()}
    (dshared,) = torch.autograd.grad(run(**leaves).square().sum(), leaves["shared"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative: use impl='reference'"):
        dshared.sum().backward()


def test_what_the_kernels_cannot_do_is_refused_in_one_line():
    with pytest.raises(ValueError, match="keep sums in float32: for float64 use impl='reference'"):
        run(**inputs_of(1, 9, 1, 10, 12, dtype=torch.float64))
    with pytest.raises(ValueError, match="at most K = 128 and shared has 129: use impl='reference'"):
        run(**inputs_of(1, 9, 1, 129, 12))


@pytest.mark.gpu
def test_keys_too_wide_for_the_kernels_run_all_the_same():
    inputs = inputs_of(1, 9, 1, 130, 12)
    assert torch.equal(*(shared_attention(**inputs, impl=impl) for impl in ("auto", "reference")))
