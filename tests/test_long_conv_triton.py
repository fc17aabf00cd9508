"""The Triton implementation of the long convolution: in Triton's interpreter without a GPU, on it with one."""

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from chela.ops import long_conv
from chela.ops.long_conv import fused, method, packed, reference, toeplitz
from chela.ops.long_conv.fourier import fft_conv
from chela.ops.random_inputs import draw, long_conv_inputs
from chela.ops.testing import check_op, error_budget, relative_error, values_and_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DOUBLE, SINGLE, HALF, BRAIN = torch.float64, torch.float32, torch.float16, torch.bfloat16
M = toeplitz.TILES.block
METHODS = [("toeplitz", SINGLE), ("toeplitz", HALF), ("on_chip", BRAIN), ("transform", SINGLE), ("transform", DOUBLE)]
convolve: Any = functools.partial(long_conv, impl="triton", return_state=True)


def take(monkeypatch, name):
    """Take the choice of the method away."""
    monkeypatch.setattr(method, "choose", lambda *sizes, room: name)
    monkeypatch.setattr(
        fused, "keeps", lambda dtype, total, room: name in ("toeplitz", "on_chip") and dtype.itemsize == 2
    )
    monkeypatch.setattr(fused, "keeps_spectra", lambda dtype, total, taps: name == "panels" and dtype.itemsize == 2)


@pytest.fixture(params=METHODS, ids=lambda case: f"{case[0]}-{case[1]}".replace("torch.", ""))
def dtype(request, monkeypatch):
    """A dtype to test in, with the choice of the method taken away."""
    name, dtype = request.param
    take(monkeypatch, name)
    return dtype


@pytest.fixture
def by_toeplitz(monkeypatch):
    take(monkeypatch, "toeplitz")


def plain(x, kernel, reverse_kernel=None, state=None, form=reference.direct):
    """A form of the reference in the precision of x, and the last L-1 inputs."""
    history = x if state is None else torch.cat([state, x], dim=1)
    after = history[:, max(0, history.shape[1] - kernel.shape[1] + 1) :] if reverse_kernel is None else None
    reverse = kernel[:, :0] if reverse_kernel is None else reverse_kernel[:, : x.shape[1] - 1]
    kernel, reverse = (taps.to(x.dtype) for taps in (kernel[:, : history.shape[1]], reverse))
    return form(history, kernel, reverse, x.shape[1]), after


def check(op, inputs):
    """Hold values and gradients to the budget: that of `check_op`, from the worse of the reference's two forms.

    In float64, where there is nothing wider, the sum over lags is the truth and the limit a transform's rounding.
    """
    dtype = inputs["x"].dtype
    actual = values_and_gradients(op, inputs, rounded_to=dtype)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    high = values_and_gradients(plain, wide, rounded_to=dtype)
    forms = [reference.direct] if dtype == HALF else [reference.direct, fft_conv]
    lows = [values_and_gradients(functools.partial(plain, form=form), inputs, rounded_to=dtype) for form in forms]
    assert actual.keys() == high.keys()
    for name, value in high.items():
        assert actual[name].shape == value.shape, name
        assert torch.isfinite(actual[name]).all(), name
        if dtype == DOUBLE:
            assert relative_error(actual[name], value) <= 1e-13, name
        elif value.numel():
            budget = max(error_budget(low[name], value, actual[name].dtype) for low in lows)
            assert (actual[name].double() - value).abs().max() <= budget, name


def inputs_of(*sizes, **options):
    return long_conv_inputs(*sizes, device=DEVICE, **options)


# T, L: around one and two blocks, primes, kernels of one tap, few, a third, all and more than the input
SIZES = [
    (1, 1),
    (1, 40),
    (2, 3),
    (3, 3),
    (M - 1, M),
    (M, M),
    (M + 1, 1),
    (M + 1, 7),
    (M + 1, 400),
    (211, 70),
    (293, 293),
]


@pytest.mark.parametrize(("length", "lags"), SIZES)
def test_causal_values_states_and_gradients_are_within_the_budget(length, lags, dtype, nan_memory):
    carried_ones = {None, min(1, lags - 1), (lags - 1) // 2, lags - 1}
    for carried in carried_ones if DEVICE == "cuda" or length == 211 else {None, lags - 1}:
        check(convolve, inputs_of(2, length, 5, lags, state=carried, dtype=dtype))


@pytest.mark.parametrize(("lags", "ahead"), [(1, 0), (1, 1), (7, 200), (200, 7), (150, M), (M + 2, 2 * M), (300, 300)])
@pytest.mark.parametrize("length", [1, *(pytest.param(n, marks=pytest.mark.gpu) for n in (2, M)), 211])
def test_bidirectional_values_and_gradients_are_within_the_budget(length, lags, ahead, dtype, nan_memory):
    op = functools.partial(long_conv, causal=False, impl="triton")
    check(op, inputs_of(2, length, 5, lags, reverse=ahead, dtype=dtype))


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_inputs_of_any_layout(layout, dtype):
    inputs = inputs_of(3, 140, 3, 150, state=20, dtype=dtype)
    other = inputs_of(3, 140, 3, 150, state=20, dtype=dtype, layout=layout)
    other["kernel"] = other["kernel"].mT.contiguous().mT
    expected, actual = values_and_gradients(convolve, inputs), values_and_gradients(convolve, other)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_more_channels_than_a_tile_holds(by_toeplitz):
    check(convolve, inputs_of(1, 5, toeplitz.TILES.channels + 3, 4, state=2))


@settings(max_examples=8)
@given(data=st.data(), length=st.integers(1, 300), lags=st.sampled_from([2, 9, 150, 400]))
def test_any_split_with_carried_state_equals_the_whole(data, length, lags):
    inputs = inputs_of(1, length, 2, lags, state=data.draw(st.integers(0, lags - 1)), dtype=HALF)
    cuts = data.draw(st.lists(st.integers(0, length), max_size=3))  # a piece may be empty

    def in_pieces(x, kernel, state):
        outs = []
        for start, stop in itertools.pairwise([0, *sorted(cuts), length]):
            out, state = convolve(x[:, start:stop], kernel, state=state)
            outs.append(out)
        return torch.cat(outs, dim=1), state

    check_op(in_pieces, plain, inputs)


def bounds(*ends):
    return torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE)


BOUNDS = (0, 2, M + 2, M + 3, M + 3, 2 * M + 7, 390, 390)  # empty documents, short ones, whole blocks


@pytest.mark.parametrize("lags", [1, 9, 200])
@pytest.mark.parametrize("carried", [None, 0, 5])
def test_packed_documents_get_the_bits_they_get_alone(lags, carried, nan_memory):
    inputs = inputs_of(1, 390, 3, lags, dtype=HALF)
    if carried is not None:
        inputs["state"] = draw(len(BOUNDS), min(carried, lags - 1), 3, seed=5, dtype=HALF, device=DEVICE)
    op = functools.partial(convolve, cu_seqlens=bounds(*BOUNDS))
    actual = values_and_gradients(op, inputs)
    for n, (start, stop) in enumerate(itertools.pairwise((0, *BOUNDS))):
        before = inputs["state"][n : n + 1] if carried is not None else None
        out, after = convolve(inputs["x"][:, start:stop], inputs["kernel"], state=before)
        assert torch.equal(actual["out"][:, start:stop], out)
        missing = lags - 1 - after.shape[1]
        assert torch.equal(actual["state"][n : n + 1, missing:], after)
        assert (actual["state"][n, :missing] == 0).all()
    expected = functools.partial(long_conv, cu_seqlens=bounds(*BOUNDS), return_state=True, impl="reference")
    check_op(op, expected, inputs)


@pytest.mark.parametrize("poison", [float("nan"), 1e3])
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_a_document_never_reaches_its_neighbours(poison, dtype):
    inputs = inputs_of(1, 300, 3, 200, dtype=dtype)
    op = functools.partial(convolve, cu_seqlens=bounds(70, 150, 300))
    clean = values_and_gradients(op, inputs)
    inputs["x"][:, 70:150] = poison
    dirty = values_and_gradients(op, inputs)
    for name, part in itertools.product(("out", "grad x"), (slice(70), slice(150, None))):
        assert torch.equal(clean[name][:, part], dirty[name][:, part]), name
    assert torch.equal(clean["state"][[0, 2]], dirty["state"][[0, 2]])


@pytest.mark.parametrize("ends", [(10,), (0, 0, 10), (1, 2, 3, 10), (8, 16, 16, 24)])
@pytest.mark.parametrize("carried", [0, 3, 9])
def test_packed_layout_keeps_order_and_fits(ends, carried):
    layout = packed.lay_out(torch.tensor([0, *ends], dtype=torch.int32), ends[-1], carried, 8)
    at = torch.cat(
        [
            torch.cat([layout.states[n], layout.tokens[start:stop]])
            for n, (start, stop) in enumerate(itertools.pairwise((0, *ends)))
        ]
    )
    assert (at.diff() > 0).all()
    assert at.min() >= 0
    assert at.max() < layout.size
    for n, (start, stop) in enumerate(itertools.pairwise((0, *ends))):
        mine = torch.cat([layout.states[n], layout.tokens[start:stop]])
        assert (mine.diff() == 1).all()
        assert (layout.tokens[start:stop][:1] % 8 == 0).all()
        blocks = (mine // 8).unique()
        assert layout.before[blocks].tolist() == list(range(len(blocks)))
        assert layout.after[blocks].tolist() == list(range(len(blocks)))[::-1]


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_toeplitz_tiles_leak_nothing_from_the_future(dtype, by_toeplitz):
    inputs = inputs_of(2, 300, 3, 300, dtype=dtype)
    out, _ = convolve(**inputs)
    for t in (0, 63, M - 1, M, 298):
        changed = inputs["x"].clone()
        changed[:, t + 1 :] = 1e4 * draw(2, 299 - t, 3, seed=9, dtype=dtype, device=DEVICE).clamp(-6, 6)
        other, _ = convolve(changed, inputs["kernel"])
        assert torch.equal(out[:, : t + 1], other[:, : t + 1])
        assert not torch.equal(out[:, t + 1 :], other[:, t + 1 :])


def test_two_runs_are_bit_equal(dtype):
    inputs = inputs_of(3, 200, 3, 150, state=30, dtype=dtype)
    first, second = (values_and_gradients(convolve, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_tokens_and_no_rows(dtype):
    x, kernel, state = inputs_of(2, 0, 5, 9, state=7, dtype=dtype).values()
    out, after = convolve(x, kernel, state=state)
    assert out.shape == (2, 0, 5)
    assert torch.equal(after, state)
    values = values_and_gradients(convolve, {"x": draw(0, 30, 5, seed=0, dtype=dtype, device=DEVICE), "kernel": kernel})
    assert values["out"].shape == (0, 30, 5)
    assert (values["grad kernel"] == 0).all()


def test_autocast_changes_nothing():
    inputs = inputs_of(2, 100, 5, 60, state=5, dtype=HALF)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(convolve(**inputs)[0], convolve(**inputs)[0].half())


def test_gradients_of_gradients():
    leaves = [
        draw(*shape, seed=2, dtype=DOUBLE, device=DEVICE).requires_grad_() for shape in ((1, 4, 1), (1, 3), (1, 2))
    ]
    assert torch.autograd.gradgradcheck(lambda *x: torch.ops.chela.long_conv.default(*x, 3), leaves)


def test_ops_are_well_registered(dtype):
    wide = DOUBLE if dtype == DOUBLE else SINGLE
    history = draw(2, 30, 3, seed=0, dtype=dtype, layout="transposed", device=DEVICE)
    taps = [draw(3, lags, seed=lags, dtype=wide, device=DEVICE) for lags in (25, 24)]
    leaves = [tensor.requires_grad_() for tensor in (history, *taps)]
    torch.library.opcheck(torch.ops.chela.long_conv.default, (*leaves, 25))


def test_packed_op_is_well_registered():
    x, kernel = (tensor.requires_grad_() for tensor in inputs_of(1, 30, 3, 20, dtype=HALF).values())
    state = draw(3, 5, 3, seed=3, dtype=HALF, device=DEVICE).requires_grad_()
    torch.library.opcheck(torch.ops.chela.packed_long_conv.default, (x, state, kernel, bounds(0, 10, 30)))


@pytest.mark.parametrize("options", [{"state": 4}, {"reverse": 30}, {"packed": True}])
def test_compiles_without_graph_breaks(options):
    ends = bounds(40, 100) if options.pop("packed", False) else None
    inputs = inputs_of(1, 100, 5, 60, dtype=HALF, **options)
    op = functools.partial(long_conv, causal="reverse" not in options, cu_seqlens=ends, impl="triton")
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    actual, expected = values_and_gradients(compiled, inputs), values_and_gradients(op, inputs)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_compiles_once_for_all_lengths():
    compiled = torch.compile(convolve, fullgraph=True, backend="eager", dynamic=True)
    kernel = draw(5, 700, seed=1, device=DEVICE)
    with torch.compiler.set_stance("default"):
        compiled(draw(2, 100, 5, seed=0, dtype=HALF, device=DEVICE), kernel)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (101, 127, 699):
            x = draw(2, length, 5, seed=0, dtype=HALF, device=DEVICE)
            assert torch.equal(compiled(x, kernel)[0], convolve(x, kernel)[0])


def high_precision(x, kernel, state=None):
    """The convolution theorem in float64, rounded at the end."""
    history = x if state is None else torch.cat([state, x], dim=1)
    lags = min(history.shape[1], kernel.shape[1])
    return fft_conv(history, kernel[:, :lags], kernel[:, :0], x.shape[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF, SINGLE])
@pytest.mark.parametrize(("length", "lags"), [(127, 127), (1000, 333), (1000, 1000), (4099, 4099), (14_113, 20_000)])
def test_errors_on_a_gpu(length, lags, dtype, nan_memory):
    inputs = long_conv_inputs(2, length, 24, lags, state=100, dtype=dtype, device="cuda")
    actual = values_and_gradients(functools.partial(long_conv, impl="triton"), inputs)
    again = values_and_gradients(functools.partial(long_conv, impl="triton"), inputs)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    expected = values_and_gradients(high_precision, wide, rounded_to=dtype)
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= (1e-5 if dtype == SINGLE else 0.006), name
        assert torch.equal(actual[name], again[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, SINGLE])
@pytest.mark.parametrize("lags", [7, 1000, 65_537])
def test_more_than_65536_tokens_on_a_gpu(lags, dtype):
    inputs = long_conv_inputs(1, 65_537, 10, lags, dtype=dtype, device="cuda")
    actual = values_and_gradients(functools.partial(long_conv, impl="triton"), inputs)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    for name, value in values_and_gradients(high_precision, wide, rounded_to=dtype).items():
        assert relative_error(actual[name], value) <= (1e-5 if dtype == SINGLE else 0.006), name


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_is_within_the_budget():
    for sizes in ((3, 127, 20, 127), (2, 1000, 20, 300), (2, 300, 20, 1000)):
        check_op(convolve, plain, inputs_of(*sizes, state=sizes[3] // 2, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, SINGLE])
def test_kernels_compile_once_for_fifty_lengths(dtype):
    from triton import knobs

    compiled = []
    run = functools.partial(long_conv, impl="triton")
    values_and_gradients(run, inputs_of(2, 500, 32, 500, dtype=dtype))
    knobs.runtime.jit_post_compile_hook = lambda **arguments: compiled.append(arguments["repr"])
    try:
        for length in range(601, 1001, 8):
            values_and_gradients(run, inputs_of(2, length, 32, length, dtype=dtype))
    finally:
        knobs.runtime.jit_post_compile_hook = None
    assert not compiled
