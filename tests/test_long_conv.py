import functools
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import jaxtyped
from torch.nn import functional as F

from chela.ops import long_conv, long_conv_step
from chela.ops.long_conv import reference
from chela.ops.long_conv.fourier import fft_conv, good_size
from chela.ops.random_inputs import draw, long_conv_inputs
from chela.ops.short_conv.reference import stepwise
from chela.ops.testing import check_op, relative_error, values_and_gradients

DOUBLE = torch.float64
convolve: Any = functools.partial(long_conv, return_state=True, impl="reference")


def assert_same(actual, expected, tolerance=1e-10):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert relative_error(actual[name], value) <= tolerance, name


def by_definition(x, kernel, reverse_kernel=None, state=None):
    """The sum over lags, with every lag the kernels have, and the last L-1 inputs."""
    history = x if state is None else torch.cat([state, x], dim=1)
    reverse = kernel[:, :0] if reverse_kernel is None else reverse_kernel
    out = reference.direct(history, kernel, reverse, x.shape[1])
    return out, history[:, max(0, history.shape[1] - kernel.shape[1] + 1) :] if reverse_kernel is None else None


def in_pieces(cuts, x, kernel, state=None):
    outs = []
    for start, stop in itertools.pairwise([0, *sorted(cuts), x.shape[1]]):
        out, state = convolve(x[:, start:stop], kernel, state=state)
        outs.append(out)
    return torch.cat(outs, dim=1), state


def in_steps(x, kernel, state):
    outs = []
    for token in x.unbind(dim=1):
        out, state = long_conv_step(token, kernel, state=state, impl="reference")
        outs.append(out)
    return torch.stack(outs, dim=1), state


@pytest.mark.parametrize(
    ("length", "lags", "ahead", "carried"), [(9, 4, 3, 0), (9, 20, 20, 0), (5, 7, 0, 4), (1, 1, 0, 0)]
)
def test_direct_form_is_the_sum_of_the_docstring(length, lags, ahead, carried):
    history = draw(2, carried + length, 3, seed=0, dtype=DOUBLE)
    kernel, reverse = draw(3, lags, seed=1, dtype=DOUBLE), draw(3, ahead, seed=2, dtype=DOUBLE)
    out = reference.direct(history, kernel, reverse, length)
    end = carried + length
    for t in range(length):
        now = carried + t
        past = [kernel[:, lag] * history[:, now - lag] for lag in range(lags) if lag <= now]
        future = [reverse[:, lag - 1] * history[:, now + lag] for lag in range(1, ahead + 1) if now + lag < end]
        torch.testing.assert_close(out[:, t], sum(past) + sum(future))


# T, L: around the length below which no transform is taken, primes, kernels shorter and longer than the input
SIZES = [(1, 1), (1, 40), (2, 3), (16, 16), (17, 17), (63, 63), (64, 20), (65, 200), (100, 1), (127, 64), (193, 193)]


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
@pytest.mark.parametrize(("length", "lags"), SIZES)
def test_causal_op_equals_the_definition_in_values_and_all_gradients(length, lags, layout):
    for carried in {None, 0, min(1, lags - 1), (lags - 1) // 2, lags - 1}:
        inputs = long_conv_inputs(2, length, 5, lags, state=carried, dtype=DOUBLE, layout=layout)
        expected = values_and_gradients(by_definition, inputs)
        assert expected["state"].shape[1] == min((carried or 0) + length, lags - 1)
        assert_same(values_and_gradients(convolve, inputs), expected)


@pytest.mark.parametrize("ahead", [None, 0, 1, 2, 62, 63, 100])
@pytest.mark.parametrize(("length", "lags"), SIZES)
def test_bidirectional_op_equals_the_definition_in_values_and_all_gradients(length, lags, ahead):
    inputs = long_conv_inputs(2, length, 5, lags, reverse=ahead, dtype=DOUBLE)
    op = functools.partial(long_conv, causal=False)
    expected = values_and_gradients(lambda **tensors: by_definition(**tensors)[0], inputs)
    assert_same(values_and_gradients(op, inputs), expected)


@pytest.mark.parametrize(
    ("length", "lags", "ahead", "carried"), [(20, 9, 0, 0), (20, 9, 0, 8), (7, 9, 0, 8), (20, 9, 6, 0)]
)
def test_three_forms_agree(length, lags, ahead, carried):
    history = draw(2, carried + length, 3, seed=0, dtype=DOUBLE)
    inputs = {"history": history, "kernel": draw(3, lags, seed=1, dtype=DOUBLE)}
    inputs["reverse"] = draw(3, ahead, seed=2, dtype=DOUBLE)
    expected = values_and_gradients(functools.partial(reference.direct, length=length), inputs)
    for form in (reference.grouped, fft_conv):
        assert_same(values_and_gradients(functools.partial(form, length=length), inputs), expected)


@given(data=st.data(), length=st.integers(1, 90), lags=st.sampled_from([1, 2, 9, 33, 64, 150]), seed=st.integers(0, 99))
def test_any_split_and_single_steps_equal_the_whole(data, length, lags, seed):
    carried = data.draw(st.integers(0, lags - 1))
    inputs = long_conv_inputs(1, length, 3, lags, state=carried, dtype=DOUBLE, seed=seed)
    cuts = data.draw(st.lists(st.integers(0, length), max_size=4))  # a piece may be empty
    whole = values_and_gradients(convolve, inputs)
    assert_same(values_and_gradients(functools.partial(in_pieces, cuts), inputs), whole)
    assert_same(values_and_gradients(in_steps, inputs), whole)


def test_steps_from_nothing_equal_the_whole():
    x, kernel = long_conv_inputs(2, 50, 3, 20, dtype=DOUBLE).values()
    out, state = in_steps(x, kernel, x[:, :0])
    expected, expected_state = convolve(x, kernel)
    assert relative_error(out, expected) < 1e-12
    assert torch.equal(state, expected_state)


def test_states_share_no_memory_with_inputs():
    x, kernel, state = long_conv_inputs(2, 10, 5, 40, state=20).values()
    kept = state.clone()
    _, after = convolve(x, kernel, state=state)
    _, fresh = convolve(x, kernel)
    _, stepped = long_conv_step(x[:, 0], kernel, state=state)
    assert torch.equal(state, kept)
    storages = {tensor.untyped_storage().data_ptr() for tensor in (x, state)}
    assert not storages & {tensor.untyped_storage().data_ptr() for tensor in (after, fresh, stepped)}


@pytest.mark.parametrize("size", [63, 64, 100, 127])
def test_nothing_wraps_around(size):
    kernel = draw(2, size, seed=1, dtype=DOUBLE)
    impulse = torch.zeros(1, size, 2, dtype=DOUBLE)
    impulse[:, -1] = 1
    out, _ = long_conv(impulse, kernel)
    torch.testing.assert_close(out[0, -1], kernel[:, 0])
    assert out[:, :-1].abs().max() < 1e-13
    out, _ = long_conv(impulse.flip(1), kernel, reverse_kernel=kernel, causal=False)
    torch.testing.assert_close(out[0], kernel.T)


def transform_error(x, kernel, out):
    """Largest rounding error of the convolution through transforms of n points, entry by entry [D] (worst case).

    Each transform has a relative error in the Euclidean norm of at most log2(n) (u + 4 sqrt(2) u), u the unit roundoff
    (Higham, Accuracy and Stability of Numerical Algorithms, theorem 24.2); the two forward ones reach an entry of the
    result through Cauchy-Schwarz, the inverse one through the norm of the whole result.
    """
    n = good_size(x.shape[1] + kernel.shape[1] - 1)
    each = math.log2(n) * (1 + 4 * math.sqrt(2)) * torch.finfo(x.dtype).eps / 2
    return each * (2 * x.norm(dim=1) * kernel.norm(dim=1) + out.norm(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_the_past_feels_the_future_by_no_more_than_rounding(size, dtype):
    x, kernel = long_conv_inputs(2, 400, 5, 400, dtype=dtype).values()
    whole = torch.nn.functional.pad(x, (0, 0, 0, 400))  # so that the norm of the result takes in its tail
    bound = transform_error(x, kernel, long_conv(whole, kernel)[0])
    out, _ = long_conv(x, kernel)
    for t in (0, 100, 398):
        changed = whole.clone()
        changed[:, t + 1 : 400] = size * draw(2, 399 - t, 5, seed=9, dtype=dtype)
        other, _ = long_conv(changed[:, :400], kernel)
        other_bound = transform_error(changed, kernel, long_conv(changed, kernel)[0])
        assert ((out - other)[:, : t + 1].abs() <= (bound + other_bound).unsqueeze(1)).all()
        assert (out - other)[:, t + 1 :].abs().max() > 0.1


def test_with_few_lags_the_past_stays_bit_equal_when_the_future_changes(monkeypatch):
    monkeypatch.setattr(reference, "fft_conv", None)  # few lags take no transform, however long the input
    x, kernel = long_conv_inputs(2, 400, 5, reference.FEW_LAGS).values()
    out, _ = long_conv(x, kernel)
    changed = x.clone()
    changed[:, 101:] = float("nan")
    assert torch.equal(long_conv(changed, kernel)[0][:, :101], out[:, :101])


BOUNDS = torch.tensor([0, 0, 2, 70, 71, 71, 150, 150], dtype=torch.int32)  # empty documents and short ones


@pytest.mark.parametrize("lags", [1, 9, 60, 200])
@pytest.mark.parametrize("carried", [None, 0, 5])
def test_packed_documents_get_the_bits_they_get_alone(carried, lags):
    inputs = long_conv_inputs(1, 150, 5, lags)
    if carried is not None:
        inputs["state"] = draw(7, min(carried, lags - 1), 5, seed=5)
    packed = values_and_gradients(functools.partial(convolve, cu_seqlens=BOUNDS), inputs)
    assert packed["state"].shape == (7, lags - 1, 5)
    for n, (start, stop) in enumerate(itertools.pairwise(BOUNDS.tolist())):
        before = None if carried is None else inputs["state"][n : n + 1]
        out, after = convolve(inputs["x"][:, start:stop], inputs["kernel"], state=before)
        assert torch.equal(packed["out"][:, start:stop], out)
        missing = lags - 1 - after.shape[1]
        assert torch.equal(packed["state"][n : n + 1, missing:], after)
        assert (packed["state"][n, :missing] == 0).all()


@pytest.mark.parametrize("lags", [9, 100])
@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_a_document_never_reaches_its_neighbours(poison, lags):
    inputs = long_conv_inputs(1, 150, 5, lags)
    op = functools.partial(convolve, cu_seqlens=torch.tensor([0, 70, 150], dtype=torch.int32))
    clean = values_and_gradients(op, inputs)
    inputs["x"][:, 40:70] = poison
    dirty = values_and_gradients(op, inputs)
    for name in ("out", "grad x"):
        assert torch.equal(clean[name][:, 70:], dirty[name][:, 70:]), name
    assert torch.equal(clean["state"][1], dirty["state"][1])


def test_more_than_65536_tokens():
    length = 65_536 + 131
    x, kernel, reverse = long_conv_inputs(1, length, 1, length, reverse=length - 1, dtype=DOUBLE).values()
    grad = draw(1, length, 1, seed=9, dtype=DOUBLE)
    leaves = [tensor.requires_grad_() for tensor in (x, kernel, reverse)]
    out, _ = long_conv(x, kernel, reverse_kernel=reverse, causal=False)
    d_x, d_kernel, d_reverse = torch.autograd.grad(out, leaves, grad)
    x, kernel, reverse, out, grad = (tensor.detach().flatten() for tensor in (x, kernel, reverse, out, grad))
    for t in (0, 1, 32_768, 65_536, length - 1):  # single entries by their definition
        ahead = length - 1 - t
        expected = kernel[: t + 1].flip(0) @ x[: t + 1] + reverse[:ahead] @ x[t + 1 :]
        torch.testing.assert_close(out[t], expected, rtol=1e-10, atol=1e-10)
        expected = kernel[: ahead + 1] @ grad[t:] + reverse[:t].flip(0) @ grad[:t]
        torch.testing.assert_close(d_x[0, t, 0], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(d_kernel[0, t], grad[t:] @ x[: length - t], rtol=1e-10, atol=1e-10)
        if t:
            torch.testing.assert_close(d_reverse[0, t - 1], grad[: length - t] @ x[t:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lags", [9, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_is_within_the_budget(dtype, lags):
    inputs = long_conv_inputs(2, 300, 5, lags, state=lags // 2, dtype=dtype)

    def plain(x, kernel, state):
        out, after = by_definition(x, kernel.to(x.dtype), state=state)
        if x.dtype == torch.float32:
            before = F.pad(state, (0, 0, lags - 1 - state.shape[1], 0))
            out = stepwise(torch.cat([before, x], dim=1), kernel.flip(1), None)  # a library's sums may be as these
        return out, after

    errors = check_op(convolve, plain, inputs)
    assert errors["out"] <= torch.finfo(dtype).eps * (1 if dtype != torch.float32 else math.log2(600))


@pytest.mark.gpu
@pytest.mark.parametrize("lags", [9, 300, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_on_a_gpu_is_within_the_budget_and_deterministic(dtype, lags, nan_memory):
    inputs = long_conv_inputs(2, 1000, 40, lags, state=lags // 2, dtype=dtype, device="cuda")

    def plain(x, kernel, state):
        return by_definition(x, kernel.to(x.dtype), state=state)

    check_op(convolve, plain, inputs)


@pytest.mark.parametrize("lags", [9, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_summed_in_float32(dtype, lags):
    inputs = long_conv_inputs(2, 100, 5, lags, state=5, dtype=dtype)
    out, state = convolve(**inputs)
    wide, _ = convolve(**{name: tensor.float() for name, tensor in inputs.items()})
    assert out.dtype == state.dtype == dtype
    assert torch.equal(out, wide.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(convolve(**inputs)[0], out)


@pytest.mark.parametrize("lags", [9, 100])
def test_no_tokens(lags):
    x, kernel, state = long_conv_inputs(2, 0, 5, lags, state=7).values()
    out, after = convolve(x, kernel, state=state)
    assert out.shape == (2, 0, 5)
    assert torch.equal(after, state)


def test_transforms_have_even_lengths_of_small_primes():
    for n in (1, 2, 3, 7, 11, 97, 127, 1000, 2049):
        size = good_size(n)
        assert n <= size < 2 * n + 2
        assert size % 2 == 0
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        assert rest == 1
    assert good_size(2047) == 2048
    assert good_size(2049) == 2160


def test_gradients_are_the_derivatives():
    history = draw(2, 7, 2, seed=0, dtype=DOUBLE).requires_grad_()
    kernel = draw(2, 5, seed=1, dtype=DOUBLE).requires_grad_()
    reverse = draw(2, 4, seed=2, dtype=DOUBLE).requires_grad_()
    op = functools.partial(fft_conv, length=5)
    assert torch.autograd.gradcheck(op, (history, kernel, reverse))
    assert torch.autograd.gradgradcheck(op, (history, kernel, reverse))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, DOUBLE])
def test_fourier_op_is_well_registered(dtype):
    arguments = [draw(2, 30, 3, seed=0, dtype=dtype, layout="transposed"), draw(3, 25, seed=1), draw(3, 24, seed=2)]
    wide = torch.float64 if dtype == DOUBLE else torch.float32
    leaves = [arguments[0], *(tensor.to(wide) for tensor in arguments[1:])]
    torch.library.opcheck(torch.ops.chela.fft_conv.default, (*(tensor.requires_grad_() for tensor in leaves), 25))


@pytest.mark.parametrize("lags", [9, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_compiles_without_graph_breaks(causal, lags):
    inputs = long_conv_inputs(2, 100, 5, lags, state=4 if causal else None, reverse=None if causal else lags)
    op = functools.partial(long_conv, causal=causal, return_state=causal)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_same(values_and_gradients(compiled, inputs), values_and_gradients(op, inputs), 1e-6)


def test_compiles_once_for_all_lengths():
    compiled = torch.compile(long_conv, fullgraph=True, backend="eager", dynamic=True)
    kernel = draw(5, 700, seed=1)
    with torch.compiler.set_stance("default"):
        compiled(draw(2, 100, 5, seed=0), kernel)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (101, 127, 699):
            x = draw(2, length, 5, seed=0)
            assert torch.equal(compiled(x, kernel)[0], long_conv(x, kernel)[0])


def test_step_compiles_without_graph_breaks():
    inputs = long_conv_inputs(2, 1, 5, 40, state=30)
    inputs["x"] = inputs["x"][:, 0]
    compiled = torch.compile(long_conv_step, fullgraph=True, backend="aot_eager")
    assert_same(values_and_gradients(compiled, inputs), values_and_gradients(long_conv_step, inputs), 1e-6)


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, x, kernel):
            return long_conv(x, kernel)[0]

    inputs = tuple(long_conv_inputs(2, 100, 5, 100).values())
    program = torch.export.export(Module(), inputs)
    assert torch.equal(program.module()(*inputs), Module()(*inputs))


def test_annotated_shapes_hold():
    beartype = pytest.importorskip("beartype").beartype
    x, kernel, reverse, state = long_conv_inputs(2, 40, 5, 30, reverse=20, state=8).values()
    jaxtyped(long_conv, typechecker=beartype)(x, kernel, state=state, return_state=True)
    jaxtyped(long_conv, typechecker=beartype)(x, kernel, reverse_kernel=reverse, causal=False)
    jaxtyped(long_conv_step, typechecker=beartype)(x[:, 0], kernel, state=state)


GOOD = long_conv_inputs(2, 10, 5, 8, state=4)
ENDS = torch.tensor([0, 4, 10], dtype=torch.int32)
PACKED: dict[str, Any] = {"x": GOOD["x"][:1], "state": None}
KERNEL = GOOD["kernel"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": GOOD["x"][0]}, r"x must be \[B, T, D\]; got \[10, 5\]"),
        ({"x": GOOD["x"].cfloat(), "state": None}, "x must be a floating-point tensor; got torch.complex64"),
        ({"kernel": KERNEL.mT}, r"kernel must be \[D, L\] with D = 5, L >= 1; got \[8, 5\]"),
        ({"kernel": KERNEL[:, :0]}, "L >= 1"),
        ({"kernel": KERNEL.double()}, "kernel is float64 but x is torch.float32: cast kernel to float32"),
        ({"kernel": KERNEL.to("meta")}, "kernel must be on the device of x"),
        ({"reverse_kernel": KERNEL}, "reverse_kernel looks into the future: it needs causal=False"),
        ({"reverse_kernel": KERNEL[:3], "causal": False, "state": None}, r"reverse_kernel must be \[D, L\] with D = 5"),
        ({"state": GOOD["state"][:1]}, r"state must be \[B, S, D\] = \[2, 4, 5\]; got \[1, 4, 5\]"),
        ({"state": GOOD["x"]}, r"state must be \[B, S, D\] with S at most L-1 = 7; got \[2, 10, 5\]"),
        ({"state": GOOD["state"].half()}, "state must have the dtype of x"),
        ({"causal": False}, "state needs causal=True"),
        ({"causal": False, "state": None, "return_state": True}, "return_state needs causal=True"),
        ({"cu_seqlens": ENDS}, "cu_seqlens needs batch size 1"),
        (PACKED | {"cu_seqlens": ENDS, "state": GOOD["state"][:1]}, r"state must be \[N, S, D\] = \[2, 4, 5\]"),
        (PACKED | {"cu_seqlens": ENDS[:2]}, "cu_seqlens must go from 0 to T = 10"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, reference"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes, message):
    long_conv(**GOOD)
    long_conv(**GOOD | PACKED, cu_seqlens=ENDS)
    with pytest.raises(ValueError, match=message) as refusal:
        long_conv(**GOOD | changes)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": GOOD["x"]}, r"x must be \[B, D\]; got \[2, 10, 5\]"),
        ({"kernel": KERNEL[:3]}, r"kernel must be \[D, L\] with D = 5"),
        ({"state": GOOD["x"]}, "S at most L-1 = 7"),
        ({"state": GOOD["state"][:1]}, r"state must be \[B, S, D\] = \[2, 4, 5\]; got \[1, 4, 5\]"),
    ],
)
def test_a_step_refuses_what_does_not_fit(changes, message):
    good = GOOD | {"x": GOOD["x"][:, 0]}
    long_conv_step(**good)
    with pytest.raises(ValueError, match=message):
        long_conv_step(**good | changes)


@pytest.mark.parametrize(("batch", "length"), [(0, 40), (2, 0), (0, 0)])
def test_nothing_in_gives_nothing_out(batch, length):
    x = torch.randn(batch, length, 4, requires_grad=True)
    state = torch.randn(batch, 31, 4)
    y, after = long_conv(x, torch.randn(4, 32), state=state, return_state=True)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad is not None
    assert after is not None
    assert after.shape == state.shape
