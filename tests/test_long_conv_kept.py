"""The long convolution keeps rows for its backward pass where gradients are wanted, and nothing else."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from chela.ops import long_conv
from chela.ops.long_conv import fused, kept, kept_spectra, method, on_chip, toeplitz
from chela.ops.long_conv.history import places
from chela.ops.long_conv.method import keeps
from chela.ops.random_inputs import draw
from chela.ops.testing import values_and_gradients
from test_long_conv_triton import DEVICE, convolve, inputs_of, take  # pyrefly: ignore

HALF, BRAIN = torch.float16, torch.bfloat16
KEEPING = {"toeplitz": toeplitz, "on_chip": on_chip}
causal = functools.partial(long_conv, impl="triton")
both_ways = functools.partial(long_conv, causal=False, impl="triton")


@pytest.fixture(params=KEEPING)
def name(request, monkeypatch):
    take(monkeypatch, request.param)
    return request.param


def saved_by(run):
    """Bytes that `run` saves for its backward pass, each storage once, and what it returned."""
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run()
    return sum(storages.values()), out


@pytest.mark.parametrize("state", [None, 0, 1, 130])
def test_kept_rows_give_the_bits_that_rows_made_again_give(name, state, monkeypatch, nan_memory):
    inputs = inputs_of(3, 150, 3, 200, state=state, dtype=HALF)
    actual = values_and_gradients(convolve, inputs)
    monkeypatch.setattr(fused, "keeps", lambda *sizes, room: False)
    expected = values_and_gradients(convolve, inputs)
    assert all(torch.equal(actual[each], expected[each]) for each in expected)


def test_kept_rows_give_the_same_both_ways(name, monkeypatch, nan_memory):
    inputs = inputs_of(2, 150, 3, 200, reverse=149, dtype=HALF)
    actual = values_and_gradients(both_ways, inputs)
    monkeypatch.setattr(fused, "keeps", lambda *sizes, room: False)
    expected = values_and_gradients(both_ways, inputs)
    assert all(torch.equal(actual[each], expected[each]) for each in expected)


def test_rows_are_saved_in_place_of_the_history(name):
    x, kernel = (tensor.requires_grad_() for tensor in inputs_of(4, 300, 5, 300, dtype=HALF).values())
    count, (out, _) = saved_by(lambda: long_conv(x, kernel, impl="triton"))
    assert out.grad_fn is not None
    assert count == 5 * 4 * 384 * 2 + kernel.nbytes  # whole blocks of 128 times, and the taps


@pytest.mark.parametrize("wanted", ["x", "kernel"])
def test_one_gradient_alone(name, wanted):
    inputs = inputs_of(2, 150, 3, 60, dtype=HALF)
    expected = values_and_gradients(causal, inputs)
    inputs[wanted].requires_grad_()
    out, _ = causal(**inputs)
    out.backward(draw(*out.shape, seed=1000, dtype=HALF, device=DEVICE))
    assert torch.equal(inputs[wanted].grad, expected[f"grad {wanted}"])
    assert sum(tensor.grad is not None for tensor in inputs.values()) == 1


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode, None])
def test_nothing_is_kept_without_gradients(name, without, monkeypatch):
    monkeypatch.setattr(kept, "convolve", None)  # cannot be called
    inputs = inputs_of(2, 150, 3, 60, dtype=HALF)
    if without is None:
        count, (out, _) = saved_by(lambda: convolve(**inputs))
        assert count == 0
    else:
        with without():
            out, _ = convolve(**{each: tensor.requires_grad_() for each, tensor in inputs.items()})
    assert not out.requires_grad


def test_what_keeps_is_what_makes_rows():
    for dtype in (HALF, BRAIN):
        for room, most in ((True, 8192), (False, 4096)):
            assert keeps(dtype, most, room=room)
            assert not keeps(dtype, most + 1, room=room)
            for length in (1, 700, most):
                for lags in (1, 500, length):
                    chosen = method.choose(dtype, most, length, min(lags, most), 0, room=room)
                    assert hasattr({**KEEPING}.get(chosen), "forward_keeping")
    assert not keeps(torch.float32, 100)


@pytest.mark.parametrize(("total", "length"), [(1, 1), (300, 300), (300, 1), (301, 173), (256, 128)])
def test_rows_have_places_for_all_and_come_back(total, length):
    history = draw(2, total, 3, seed=0, dtype=HALF, device=DEVICE)
    taps = draw(3, min(total, 7), seed=1, device=DEVICE)
    for module in KEEPING.values():
        rows = module.forward_keeping(history, taps, taps[:, :0], length)[1]
        assert rows.shape == (3, 2, places(total, length))
        assert total <= rows.shape[2] < total + 2 * 128
        assert torch.equal(module.recover(rows, total, length), history)
        assert torch.equal(module.as_kept(history, length), rows)


def test_second_derivatives(name):
    """The gradient's gradient equals that without kept rows, where the formula is held to numbers (`gradgradcheck`)."""
    history, kernel, reverse = leaves = [
        draw(2, 20, 2, seed=0, dtype=HALF, device=DEVICE).requires_grad_(),
        *(draw(2, lags, seed=lags, device=DEVICE).requires_grad_() for lags in (9, 12)),
    ]
    grad = draw(2, 14, 2, seed=5, dtype=HALF, device=DEVICE).requires_grad_()
    found = []
    for op in (kept.convolve, torch.ops.chela.long_conv.default):
        first = torch.autograd.grad(op(history, kernel, reverse, 14), leaves, grad, create_graph=True)
        cotangents = [draw(*each.shape, seed=7 + n, dtype=each.dtype, device=DEVICE) for n, each in enumerate(first)]
        found.append(torch.autograd.grad(first, [*leaves, grad], cotangents))
    assert all(torch.equal(ours, plain) for ours, plain in zip(*found, strict=True))


def test_ops_are_well_registered(name):
    history = draw(2, 30, 3, seed=0, dtype=HALF, layout="transposed", device=DEVICE)
    leaves = [history, *(draw(3, lags, seed=lags, device=DEVICE) for lags in (25, 24))]
    arguments = (*(leaf.requires_grad_() for leaf in leaves), 25)
    torch.library.opcheck(torch.ops.chela.long_conv_keeping.default, arguments)
    rows = torch.ops.chela.long_conv_keeping.default(*arguments)[1].detach()
    grad = draw(2, 25, 3, seed=2, dtype=HALF, device=DEVICE)
    torch.library.opcheck(
        torch.ops.chela.long_conv_kept_backward.default,
        (grad, rows, *(leaf.detach() for leaf in leaves[1:]), 30, 25),
    )


@pytest.mark.parametrize("keeping", [kept, kept_spectra])
def test_no_channels_and_no_inputs(keeping):
    for batch, length, channels in ((0, 9, 3), (2, 9, 0), (2, 0, 3)):
        history = draw(batch, length, channels, seed=0, dtype=HALF, device=DEVICE).requires_grad_()
        kernel = draw(channels, 4, seed=1, device=DEVICE).requires_grad_()
        out = keeping.convolve(history, kernel, kernel[:, :0], length)
        assert out.shape == history.shape
        d_history, d_kernel = torch.autograd.grad(out.sum(), [history, kernel])
        assert d_history.shape == history.shape
        assert torch.equal(d_kernel, torch.zeros_like(kernel))


@pytest.mark.parametrize(
    ("name", "backend"),
    [("toeplitz", "aot_eager"), ("on_chip", "aot_eager"), ("on_chip", "inductor")],
    indirect=["name"],
)
def test_a_compiled_program_keeps_rows_too_and_serves_every_length(name, backend):
    """Lengths, batches and kernels change; a method's own sizes are nothing that the compiler knows."""
    compiled = torch.compile(both_ways, fullgraph=True, backend=backend, dynamic=True)
    for n, (batch, length, lags) in enumerate([(2, 100, 70), (3, 101, 90), (2, 127, 700), (5, 129, 33)]):
        inputs = inputs_of(batch, length, 3, lags, reverse=lags + 4, dtype=HALF)
        with torch.compiler.set_stance("fail_on_recompile" if n else "default"):
            count, actual = saved_by(functools.partial(values_and_gradients, compiled, inputs))
        expected = values_and_gradients(both_ways, inputs)
        assert all(torch.equal(actual[each], expected[each]) for each in expected)
        assert count == 3 * batch * places(length, length) * 2 + 3 * (lags + lags + 4) * 4


def test_a_compiled_program_is_compiled_once_more_past_the_bound(monkeypatch):
    monkeypatch.setitem(method.LONGEST, "on_chip", 128)
    monkeypatch.setattr(method, "choose", lambda *sizes, room: "toeplitz")
    compiled = torch.compile(causal, fullgraph=True, backend="aot_eager", dynamic=True)
    for length, stance in [(100, "default"), (128, None), (129, "default"), (300, None), (99, None)]:
        inputs = inputs_of(2, length, 3, 50, dtype=HALF)
        with torch.compiler.set_stance(stance or "fail_on_recompile"):
            actual = values_and_gradients(compiled, inputs)
        expected = values_and_gradients(causal, inputs)
        assert all(torch.equal(actual[each], expected[each]) for each in expected)
