"""The long convolution by transforms on the matrix units: rows on the chip or in two stages, and when they run.

The rest of what holds for rows on the chip is in `test_long_conv_triton.py`, with the other methods.
"""

import functools
import itertools
import math

import pytest
import torch

pytest.importorskip("triton")

from chela.ops import long_conv
from chela.ops.long_conv import method, on_chip, panels
from chela.ops.long_conv.fourier import fft_conv
from chela.ops.long_conv.method import choose
from chela.ops.random_inputs import draw, long_conv_inputs
from chela.ops.testing import error_budget, relative_error, values_and_gradients
from test_long_conv_triton import check, convolve, high_precision, inputs_of, plain, take  # pyrefly: ignore

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF, BRAIN = torch.float16, torch.bfloat16
LONGEST = {"on_chip": 1024, "panels": 4096}
"""Rows in these tests."""
LEAK = 2**-9
"""Of the largest entry of a row and of the kernel's frequency response: what the public docstring states."""


@pytest.fixture(params=[*LONGEST, "on_chip, apart"])
def name(request, monkeypatch):
    """A method whose choice is taken away, with short rows; of those on the chip also in the form of long ones."""
    name, *apart = request.param.split(", ")
    if apart:
        monkeypatch.setitem(on_chip.SIZES, 1024, on_chip.SIZES[1024]._replace(gradients=0, beside=0))
    monkeypatch.setitem(panels.SIZES, LONGEST["panels"], panels.Size(16, 16, 16, c=4, width=8, p=16))
    take(monkeypatch, name)
    return name


@pytest.mark.parametrize(
    ("length", "lags", "state"), [(1, 1, None), (300, 200, 50), (200, 900, 300)], ids=lambda n: str(n)
)
def test_causal_values_states_and_gradients_are_within_the_budget(name, length, lags, state, nan_memory):
    check(convolve, inputs_of(2, length, 2, lags, state=state, dtype=BRAIN))


def test_bidirectional_values_and_gradients_are_within_the_budget(name, nan_memory):
    check(
        functools.partial(long_conv, causal=False, impl="triton"), inputs_of(2, 300, 2, 200, reverse=299, dtype=BRAIN)
    )


@pytest.mark.parametrize("causal", [True, False])
def test_a_full_row_never_wraps_around(name, causal):
    n = LONGEST[name]
    inputs = inputs_of(1, n, 1, n, reverse=None if causal else n - 1, dtype=HALF)
    op = convolve if causal else functools.partial(long_conv, causal=False, impl="triton")
    actual = values_and_gradients(op, inputs)
    form = functools.partial(plain, form=fft_conv)
    expected = values_and_gradients(form, {name: x.double() for name, x in inputs.items()}, rounded_to=HALF)
    for each in actual:
        assert relative_error(actual[each], expected[each]) <= 2**-9, each


PARTS = ["one tap", "a few", "a third", "all", "more", "both ways"]
INTERPRETED = [(14_113, "more"), (14_113, "both ways")]
"""The others take the interpreter five minutes."""


@pytest.mark.parametrize(
    ("length", "part"),
    [
        pytest.param(*sizes, marks=[] if sizes in INTERPRETED else pytest.mark.gpu)
        for sizes in itertools.product((14_113, 65_537), PARTS)
    ],
)
def test_rows_of_their_real_length(length, part, monkeypatch):
    take(monkeypatch, "panels")
    lags = {"one tap": 1, "a few": 7, "a third": length // 3, "all": length, "more": length + 50}.get(part, length)
    reverse, state = (length - 1, None) if part == "both ways" else (None, min(lags - 1, 100))
    inputs = inputs_of(1, length, 2, lags, reverse=reverse, state=state, dtype=HALF)
    op = functools.partial(long_conv, causal=reverse is None, return_state=reverse is None, impl="triton")
    actual = values_and_gradients(op, inputs)
    form = functools.partial(plain, form=fft_conv)
    expected = values_and_gradients(form, {name: x.double() for name, x in inputs.items()}, rounded_to=HALF)
    for each in expected:
        assert relative_error(actual[each], expected[each]) <= 2**-9, each


def test_two_runs_are_bit_equal_whatever_the_layout(name):
    inputs = inputs_of(2, 140, 2, 150, state=20, dtype=BRAIN)
    expected = values_and_gradients(convolve, inputs)
    for layout in ("contiguous", "sliced", "transposed") if DEVICE == "cuda" else ("transposed",):
        other = inputs_of(2, 140, 2, 150, state=20, dtype=BRAIN, layout=layout)
        actual = values_and_gradients(convolve, other)
        assert all(torch.equal(actual[each], expected[each]) for each in expected)


@pytest.mark.parametrize("name", ["on_chip", pytest.param("panels", marks=pytest.mark.gpu)], indirect=True)
def test_the_op_is_well_registered(name):
    history = draw(1, 30, 2, seed=0, dtype=BRAIN, layout="transposed", device=DEVICE)
    leaves = [history, *(draw(2, lags, seed=lags, device=DEVICE) for lags in (25, 24))]
    torch.library.opcheck(torch.ops.chela.long_conv.default, (*(leaf.requires_grad_() for leaf in leaves), 25))


@pytest.mark.parametrize(
    ("n", "size"),
    [
        (8192, panels.Size(16, 32, 16, c=2, width=4)),
        pytest.param(8192, panels.Size(16, 16, 32, c=4, width=8, p=16), marks=pytest.mark.gpu),
        pytest.param(2**17, panels.Size(512, 16, 16, c=2, width=4, m=32), marks=pytest.mark.gpu),
        (2**16, panels.Size(256, 16, 16, c=1, width=1, p=16, m=16)),
    ],
)
@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.gpu)])
def test_panels_of_other_cuts(n, size, batch, monkeypatch):
    monkeypatch.setattr(panels, "SIZES", {n: size})
    take(monkeypatch, "panels")
    op = functools.partial(long_conv, causal=False, impl="triton")
    check(op, inputs_of(batch, 500, 1 if size.width == 1 else 11, 400, reverse=499, dtype=BRAIN))


def test_more_rows_than_one_program_takes(monkeypatch):
    take(monkeypatch, "on_chip")
    monkeypatch.setattr(on_chip, "PROGRAMS", 4)
    rows = 1 + max(2 * on_chip.MOST, on_chip.SIZES[1024].rows)
    check(convolve, inputs_of(rows, 5, 2, 4, dtype=BRAIN))


def test_programs_that_sum_spectra_end_together():
    short, long, longest = (on_chip.SIZES[n] for n in (1024, 2048, 8192))
    assert on_chip.summed(128, 64, long) == 32  # two programs for each multiprocessor, at once
    assert on_chip.summed(128, 64, short) == 16  # four
    assert on_chip.summed(128, 16, longest) == 16  # one
    assert on_chip.summed(128, 48, long) == 24  # not 32, of which the second part would be half empty
    assert on_chip.summed(128, 2, long) == on_chip.summed(1, 1, long) == 1
    for batch in (1, 7, 33, 100):
        assert 1 <= on_chip.summed(5, batch, long) <= min(batch, on_chip.MOST)


def kernels_of(lags):
    """Kernels of many shapes [D, L]: what they pass on is spread over time and frequency in different ways."""
    t = torch.arange(lags, dtype=torch.float64)
    now, even = (t == 0).double(), torch.ones(lags, dtype=torch.float64) / lags
    chirp = torch.cos(0.5 * math.pi * t * t / lags)
    kernels = [now, even, torch.exp(-t / 50), torch.cos(0.8 * t), chirp, draw(lags, seed=1, dtype=torch.float64)]
    return torch.stack(kernels).float().to(DEVICE)


@pytest.mark.parametrize("future", ["spike", "level", "alternating", "noise", "mixed scales"])
def test_the_past_feels_the_future_by_no_more_than_is_stated(name, future):
    length = LONGEST[name] - 24
    cut, kernel = length // 2, kernels_of(length)[:: 1 if name == "on_chip" else 2]
    x = draw(1, length, kernel.shape[0], seed=0, dtype=HALF, device=DEVICE)
    noise = draw(1, length - cut, kernel.shape[0], seed=3, dtype=torch.float64, device=DEVICE)
    sign = 1 - 2 * (torch.arange(length - cut, device=DEVICE) % 2)[None, :, None]
    first = torch.zeros_like(noise)
    first[:, 0] = 3e4
    changed = x.clone()
    changed[:, cut:] = {
        "spike": first,
        "level": torch.full_like(noise, 1e3),
        "alternating": 1e3 * sign.expand_as(noise),
        "noise": 100 * noise,
        "mixed scales": (10**noise).clamp(max=6e4),
    }[future].to(HALF)
    size = 1e-3 if future == "spike" else 1.0  # outputs must stay within float16
    before, after = (long_conv(each, kernel * size, impl="triton")[0][:, :cut].double() for each in (x, changed))
    response = torch.fft.rfft(kernel.double() * size, 8 * length).abs().amax(1)  # [D]
    largest = torch.maximum(x.abs().amax(1), changed.abs().amax(1)).double()  # [1, D]
    rounding = torch.finfo(HALF).eps / 2 * (before.abs() + after.abs())  # of the outputs
    assert ((after - before).abs() <= (LEAK * largest * response)[:, None] + rounding).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
def test_a_number_that_is_not_finite_stays_in_its_row(name):
    x, kernel = inputs_of(2, 130, 3, 100, dtype=BRAIN).values()
    clean, _ = long_conv(x, kernel, impl="triton")
    for poison in (math.nan, math.inf):
        dirty = x.clone()
        dirty[1, 70, 2] = poison
        out, _ = long_conv(dirty, kernel, impl="triton")
        assert out[1, :, 2].isnan().all()
        out[1, :, 2] = clean[1, :, 2]
        assert torch.equal(out, clean)


def test_rows_of_any_scale(name):
    inputs = inputs_of(1, 130, 1, 100, dtype=BRAIN)
    expected = values_and_gradients(functools.partial(long_conv, impl="triton"), inputs)
    for power in (2.0**60, 2.0**-60) if DEVICE == "cuda" else (2.0**-60,):
        scaled = {"x": inputs["x"] * power, "kernel": inputs["kernel"] / power}
        actual = values_and_gradients(functools.partial(long_conv, impl="triton"), scaled)
        assert torch.equal(actual["out"], expected["out"])
        assert torch.equal(actual["grad x"], expected["grad x"] / power)
        assert torch.equal(actual["grad kernel"], expected["grad kernel"] * power)
    zeros = values_and_gradients(
        functools.partial(long_conv, impl="triton"), {name: torch.zeros_like(x) for name, x in inputs.items()}
    )
    assert all((value == 0).all() for value in zeros.values())


def test_the_method_by_shape():
    for length, expected in [
        (1, "toeplitz"),
        (1000, "toeplitz"),
        (1500, "toeplitz"),
        (2048, "on_chip"),
        (4096, "on_chip"),
        (8192, "on_chip"),
        (14_113, "panels"),
        (2**20, "panels"),
        (2**20 + 1, "transform"),
    ]:
        for dtype in (HALF, BRAIN):
            assert choose(dtype, length, length, length, 0) == expected
            assert choose(dtype, length, length, min(500, length), 0) == "toeplitz"  # a short kernel
        for dtype in (torch.float32, torch.float64):
            assert choose(dtype, length, length, length, 0) == "transform"
    assert choose(BRAIN, 8192, 1, 8192, 0) == "on_chip"  # a token after a long state
    assert choose(BRAIN, 2048, 2048, 2048, 2047) == "on_chip"
    narrow = [choose(BRAIN, length, length, length, 0, room=False) for length in (4096, 8192, 2**20 + 1)]
    assert narrow == ["on_chip", "panels", "transform"]


def test_the_choice_knows_the_longest_rows():
    modules = {"on_chip": on_chip, "panels": panels}
    assert {name: module.LONGEST for name, module in modules.items()} == method.LONGEST
    assert [*method.LONGEST.values()] == sorted(method.LONGEST.values())
    for module in modules.values():
        for n, size in module.SIZES.items():
            assert n == math.prod(value for key, value in size._asdict().items() if key.startswith("n"))
    for size in panels.SIZES.values():
        assert size.n2 % size.p == size.width % size.c == size.n0 % size.m == 0
        assert size.m == 1 or min(size.m, size.n0 // size.m) >= 16
        assert (size.n1, size.n2) != (64, 64)  # seen to give wrong numbers on an H200 with Triton 3.6 (docs/log.md)


@pytest.mark.parametrize("n", on_chip.SIZES)
@pytest.mark.parametrize("causal", [pytest.param(True, marks=pytest.mark.gpu), False])
def test_rows_of_every_size(n, causal, nan_memory, monkeypatch):
    take(monkeypatch, "on_chip")
    monkeypatch.setattr(on_chip, "PROGRAMS", 4)
    batch, channels = (1 + on_chip.SIZES[n].rows, 5) if DEVICE == "cuda" else (2, 2)
    reverse = None if causal else n - 4
    op = convolve if causal else functools.partial(long_conv, causal=False, impl="triton")
    check(op, inputs_of(batch, n - 3, channels, n - 3, reverse=reverse, dtype=BRAIN))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [4096, 8192, 14_113, 65_537, 140_000])
@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16_on_a_gpu(length, causal, nan_memory):
    channels = 24 if length < 20_000 else 6
    reverse, state = (None, 100) if causal else (length // 2, None)
    inputs = long_conv_inputs(2, length, channels, length, reverse=reverse, state=state, dtype=BRAIN, device="cuda")
    op = convolve if causal else functools.partial(long_conv, causal=False, impl="triton")
    actual, again = (values_and_gradients(op, inputs) for _ in range(2))
    form = functools.partial(plain, form=fft_conv)
    low = values_and_gradients(form, inputs)
    high = values_and_gradients(form, {name: x.double() for name, x in inputs.items()}, rounded_to=BRAIN)
    for name in actual:
        assert relative_error(actual[name], high[name]) <= 0.006, name
        error = (actual[name].double() - high[name]).abs().max().item()
        assert error <= error_budget(low[name], high[name], actual[name].dtype), name
        assert torch.equal(actual[name], again[name]), name


@pytest.mark.gpu
def test_the_longest_row_on_a_gpu():
    inputs = long_conv_inputs(1, 2**20, 2, 2**20, dtype=BRAIN, device="cuda")
    actual = values_and_gradients(functools.partial(long_conv, impl="triton"), inputs)
    wide = {name: x.double() for name, x in inputs.items()}
    for name, value in values_and_gradients(high_precision, wide, rounded_to=BRAIN).items():
        assert relative_error(actual[name], value) <= 0.006, name
