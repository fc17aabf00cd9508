"""The long convolution of panels keeps spectra for its backward pass where gradients are wanted, and nothing else."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from chela.ops import long_conv
from chela.ops.long_conv import fused, kept_spectra, panels
from chela.ops.long_conv.method import choose, keeps, keeps_spectra
from chela.ops.random_inputs import draw
from chela.ops.testing import values_and_gradients
from test_long_conv_kept import saved_by  # pyrefly: ignore
from test_long_conv_triton import DEVICE, convolve, inputs_of, take  # pyrefly: ignore

HALF, BRAIN = torch.float16, torch.bfloat16
causal = functools.partial(long_conv, impl="triton")
both_ways = functools.partial(long_conv, causal=False, impl="triton")
SHORT = {4096: panels.Size(16, 16, 16, c=8, width=8, p=16)}
"""The fewest programs, as the interpreter takes them one by one."""


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    take(monkeypatch, "panels")
    monkeypatch.setattr(panels, "SIZES", SHORT)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("state", [None, 130])
def test_kept_spectra_give_the_bits_that_spectra_made_again_give(batch, state, monkeypatch, nan_memory):
    inputs = inputs_of(batch, 150, 5, 200, state=state, dtype=HALF)
    actual = values_and_gradients(convolve, inputs)
    monkeypatch.setattr(fused, "keeps_spectra", lambda *sizes: False)
    expected = values_and_gradients(convolve, inputs)
    assert all(torch.equal(actual[each], expected[each]) for each in expected)


def test_spectra_are_saved_in_place_of_the_history():
    x, kernel = (tensor.requires_grad_() for tensor in inputs_of(3, 300, 5, 300, dtype=HALF).values())
    count, (out, _) = saved_by(lambda: long_conv(x, kernel, impl="triton"))
    assert out.grad_fn is not None
    panelled = 8  # 5 channels in tiles of 8
    spectra, powers = 2 * 4096 * panelled * 2, 16 * panelled * 4  # real and imaginary parts; a power a row of 256
    assert count == (3 + 1) * (spectra + powers) + kernel.nbytes


@pytest.mark.parametrize("wanted", ["x", "kernel"])
def test_one_gradient_alone(wanted):
    inputs = inputs_of(1, 150, 3, 160, dtype=HALF)
    expected = values_and_gradients(causal, inputs)
    inputs[wanted].requires_grad_()
    out, _ = causal(**inputs)
    out.backward(draw(*out.shape, seed=1000, dtype=HALF, device=DEVICE))
    assert torch.equal(inputs[wanted].grad, expected[f"grad {wanted}"])
    assert sum(tensor.grad is not None for tensor in inputs.values()) == 1


def test_nothing_is_kept_without_gradients(monkeypatch):
    monkeypatch.setattr(kept_spectra, "convolve", None)  # cannot be called
    count, (out, _) = saved_by(lambda: convolve(**inputs_of(2, 150, 3, 160, dtype=HALF)))
    assert count == 0
    assert not out.requires_grad


def test_a_second_derivative_is_refused():
    x, kernel = (tensor.requires_grad_() for tensor in inputs_of(1, 20, 2, 20, dtype=HALF).values())
    out, _ = long_conv(x, kernel, impl="triton")
    (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.sum().backward()


def test_ops_are_well_registered():
    history = draw(1, 30, 3, seed=0, dtype=HALF, layout="transposed", device=DEVICE)
    leaves = [history, *(draw(3, lags, seed=lags, device=DEVICE) for lags in (25, 24))]
    arguments = (*(leaf.requires_grad_() for leaf in leaves), 25)
    torch.library.opcheck(torch.ops.chela.long_conv_keeping_spectra.default, arguments)
    kept = (tensor.detach() for tensor in torch.ops.chela.long_conv_keeping_spectra.default(*arguments)[1:])
    grad = draw(1, 25, 3, seed=2, dtype=HALF, device=DEVICE)
    arguments = (grad, *kept, *(leaf.detach() for leaf in leaves[1:]), 30)
    torch.library.opcheck(torch.ops.chela.long_conv_spectra_backward.default, arguments)


def test_a_compiled_program_keeps_spectra_too_and_is_compiled_once_more_for_longer_rows(monkeypatch):
    """N follows from the length, and so do the shapes of what is kept."""
    monkeypatch.setattr(panels, "SIZES", {512: SHORT[4096], 4096: SHORT[4096]})
    monkeypatch.setattr(panels, "fitting", lambda inputs: 512 if inputs <= 512 else 4096)
    compiled = torch.compile(both_ways, fullgraph=True, backend="aot_eager", dynamic=True)
    for length, stance in [(100, "default"), (600, "default"), (700, None), (90, None)]:
        inputs = inputs_of(1, length, 3, length, reverse=length - 1, dtype=HALF)
        with torch.compiler.set_stance(stance or "fail_on_recompile"):
            count, actual = saved_by(functools.partial(values_and_gradients, compiled, inputs))
        expected = values_and_gradients(both_ways, inputs)
        assert all(torch.equal(actual[each], expected[each]) for each in expected)
        assert count > 2 * (2 * 4096 * 8 * 2)


def test_what_keeps_spectra_goes_in_panels(monkeypatch):
    monkeypatch.undo()
    most = panels.LONGEST
    for total in (8193, 9000, 12_000, 2**14, 2**14 + 1, 40_000, 2**16 + 1, most):
        taps = -(-3 * total // 4)
        for length, lags, ahead in (
            (total, taps, 0), (total, total, 0), (1, taps, 0), (total // 2, taps, 0), (total, 1, taps - 1),
            (total, taps // 2, taps - taps // 2), (total, total, total - 1),
        ):  # fmt: skip
            for dtype in (HALF, BRAIN):
                assert keeps_spectra(dtype, total, lags + ahead)
                assert not keeps(dtype, total)
                for room in (True, False):
                    assert choose(dtype, total, length, lags, ahead, room=room) == "panels", (total, length, lags)
        assert not keeps_spectra(BRAIN, total, taps - 1)
    assert not keeps_spectra(BRAIN, 8192, 8192)
    assert not keeps_spectra(BRAIN, most + 1, most + 1)
    assert not keeps_spectra(torch.float32, 2**14, 2**14)
