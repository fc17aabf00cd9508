import os
import subprocess
import sys

import pytest
import torch

from chela.ops import impl as impl_module
from chela.ops import linear_attention, random_inputs
from chela.ops.impl import resolve
from chela.ops.random_inputs import draw
from chela.ops.testing import assert_within_budget, check_op, relative_error, values_and_gradients

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")


@pytest.mark.parametrize(
    ("impl", "device", "op", "chosen"),
    [
        ("auto", CPU, "linear_attention", "reference"),
        ("auto", META, "linear_attention", "reference"),
        ("auto", CUDA, "linear_attention", "triton"),
        ("auto", CUDA, "without kernels", "reference"),
        ("reference", CUDA, "linear_attention", "reference"),
        ("reference", CPU, "linear_attention", "reference"),
        ("triton", CUDA, "linear_attention", "triton"),
    ],
)
def test_auto_looks_at_the_device_alone(impl, device, op, chosen):
    assert resolve(impl, device, op) == chosen


def test_triton_on_the_cpu_needs_its_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("triton", CPU, "linear_attention") == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(
        ValueError, match=r"needs tensors on a CUDA device, got cpu.*impl='reference'.*TRITON_INTERPRET=1"
    ):
        resolve("triton", CPU, "linear_attention")
    q, k, v = random_inputs.linear_attention_inputs(1, 4, 1, 2, 2).values()
    with pytest.raises(ValueError, match="needs tensors on a CUDA device"):
        linear_attention(q, k, v, impl="triton")


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_an_op_without_kernels_says_what_would_run(device):
    with pytest.raises(ValueError, match="xyz has no Triton implementation: use impl='auto' or impl='reference'"):
        resolve("triton", device, "xyz")


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_a_missing_triton_is_named(monkeypatch, impl):
    monkeypatch.setattr(impl_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package triton is not installed: install it, or use impl='reference'"):
        resolve(impl, CUDA, "linear_attention")
    assert resolve("reference", CUDA, "linear_attention") == "reference"


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="impl must be one of auto, triton, reference; got 'cuda'"):
        resolve("cuda", CPU, "linear_attention")  # pyrefly: ignore[bad-argument-type]


def test_references_run_without_triton_or_the_compiler():
    script = """
import sys
sys.modules["triton"] = None  # any import of it fails
import torch
from chela.ops import linear_attention, long_conv, short_conv
x = torch.randn(1, 100, 1, 4, requires_grad=True)
(linear_attention(x, x, x)[0].sum() + long_conv(x[:, :, 0], torch.ones(4, 100))[0].sum()).backward()
short_conv(x[:, :, 0], torch.ones(4, 3))
loaded = [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
assert not loaded, loaded
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, env=environment)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_budget_takes_rounding_and_refuses_more(dtype):
    high = draw(64, 64, seed=0, dtype=torch.float64)
    low = high.to(dtype)
    assert_within_budget(low, low, high)
    rounding = torch.finfo(dtype).eps * high.abs().max()
    allowed = high.clone()
    allowed[3, 4] += 2 * rounding
    assert_within_budget(allowed, low, high)
    too_far = high.clone()
    too_far[3, 4] += 4 * rounding  # 2 (error of rounding, at most half a band, plus the band) < 4 bands
    with pytest.raises(AssertionError, match=r"state: largest error .* budget"):
        assert_within_budget(too_far, low, high, "state")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_budget_refuses_what_is_not_finite_or_another_shape(bad):
    high = torch.ones(4, dtype=torch.float64)
    wrong = torch.ones(4)
    wrong[2] = bad
    with pytest.raises(AssertionError, match="out: 1 of 4 entries are not finite"):
        assert_within_budget(wrong, high.float(), high, "out")
    with pytest.raises(AssertionError, match=r"shape \[1\] instead of \[4\]"):
        assert_within_budget(torch.ones(1), high.float(), high)
    assert_within_budget(torch.ones(0), torch.ones(0), torch.ones(0))


def test_check_op_sees_a_wrong_gradient():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, *grads):
            return 2.01 * grads[0]

    inputs = {"x": draw(100, seed=0)}
    errors = check_op(lambda x: 2 * x, lambda x: x + x, inputs)
    assert errors.keys() == {"out", "grad x"}
    for draws in (1, 5):
        with pytest.raises(AssertionError, match="grad x: largest error"):
            check_op(Wrong.apply, lambda x: x + x, inputs, draws=draws)


def test_check_op_judges_a_single_number_by_several_draws():
    class Sometimes(torch.autograd.Function):
        """A plain implementation that is off by luck: in half of all draws."""

        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, *grads):
            lucky = (grads[0] > 0) | (grads[0].dtype == torch.float64)
            return torch.where(lucky, 2.0, 2.001) * grads[0]

    def alike(x):
        return 2 * x + 0.001 * (x - x.detach())

    inputs = {"x": draw(1, seed=0)}
    with pytest.raises(AssertionError, match="grad x: largest error"):
        check_op(alike, Sometimes.apply, inputs, seed=2, draws=1)  # a lucky one
    check_op(alike, Sometimes.apply, inputs, seed=2, draws=8)


def test_inputs_are_the_same_numbers_in_every_layout_and_dtype():
    plain = draw(3, 4, 5, seed=1, dtype=torch.float64)
    assert not torch.equal(plain, draw(3, 4, 5, seed=2, dtype=torch.float64))
    for layout in ("contiguous", "sliced", "transposed"):
        other = draw(3, 4, 5, seed=1, dtype=torch.bfloat16, layout=layout)
        assert torch.equal(other, plain.bfloat16())
        assert other.is_contiguous() == (layout == "contiguous")


def test_cotangents_are_the_same_in_every_dtype():
    inputs = {"x": draw(50, seed=0, dtype=torch.bfloat16)}
    wide = {"x": inputs["x"].double()}
    low = values_and_gradients(lambda x: x.clone(), inputs, rounded_to=torch.bfloat16)
    high = values_and_gradients(lambda x: x.clone(), wide, rounded_to=torch.bfloat16)
    assert torch.equal(low["grad x"].double(), high["grad x"])


def test_relative_error_of_zeros_and_of_nothing():
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0
    assert relative_error(torch.full((4,), 1.1), torch.ones(4)) == pytest.approx(0.1)


def test_unwritten_memory_is_nan(nan_memory):
    for memory in (torch.empty(100), torch.empty_like(torch.ones(100)), torch.ones(1).new_empty(100)):
        assert memory.isnan().all()
