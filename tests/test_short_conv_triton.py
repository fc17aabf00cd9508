"""The Triton implementation of the short convolution: in Triton's interpreter without a GPU, on it with one."""

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

pytest.importorskip("triton")

from chela.ops import short_conv, short_conv_step
from chela.ops.random_inputs import draw, short_conv_inputs
from chela.ops.short_conv import fused, kernels, reference
from chela.ops.testing import check_op, relative_error, values_and_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHUNK = 8  # the shortest stretch of time of one thread, for up to 4 taps; a program has 8 of them at 128 channels
TILE = 64
convolve: Any = functools.partial(short_conv, return_state=True, impl="triton")
forward_op = torch.ops.chela.short_conv.default
backward_op = torch.ops.chela.short_conv_backward.default


def plain(x, weight, bias=None, state=None, *, causal=True, activation=None):
    """The sum over taps in the precision of x, and the last W-1 inputs."""
    width, length = weight.shape[1], x.shape[1]
    left = width - 1 if causal else (width - 1) // 2
    before = x.new_zeros(x.shape[0], left, x.shape[2]) if state is None else state
    padded = torch.cat([before, x, x.new_zeros(x.shape[0], width - 1 - left, x.shape[2])], dim=1)
    out = reference.taps(padded, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return F.silu(out) if activation else out, padded[:, length:] if causal else None


def check(inputs, **options):
    causal = options.get("causal", True)
    op = functools.partial(short_conv, return_state=causal, impl="triton", **options)
    return check_op(op, functools.partial(plain, **options), inputs)


def inputs_of(*sizes, **options):
    return short_conv_inputs(*sizes, device=DEVICE, **options)


def ends(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_same(actual, expected, tolerance=1e-6):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert relative_error(actual[name], value) <= tolerance, name


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def in_pieces(cuts, x, weight, bias=None, state=None, **options):
    outs = []
    for start, stop in itertools.pairwise([0, *sorted(cuts), x.shape[1]]):
        out, state = convolve(x[:, start:stop], weight, bias, state=state, **options)
        outs.append(out)
    return torch.cat(outs, dim=1), state


def in_steps(x, weight, bias, state, **options):
    outs = []
    for token in x.unbind(dim=1):
        out, state = short_conv_step(token, weight, bias, state=state, impl="triton", **options)
        outs.append(out)
    return torch.stack(outs, dim=1), state


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_causal_values_states_and_gradients_are_within_the_budget(width, activation, state, nan_memory):
    for length in (1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 67):
        check(inputs_of(2, length, 5, width, state=state), activation=activation)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_centred_values_and_gradients_are_within_the_budget(width, activation, nan_memory):
    for length in (1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 67):
        check(inputs_of(2, length, 5, width), activation=activation, causal=False)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [TILE - 1, TILE, TILE + 1, 2 * TILE + 3])
def test_several_tiles_in_time_and_channels(length, causal, nan_memory):
    check(inputs_of(3, length, 140, 4, state=causal), activation="silu", causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("width", "lengths"), [(5, (3, 15, 16, 17)), (7, (6, 33)), (31, (7, 63, 65)), (32, (40, 64))])
def test_wide_kernels(width, lengths, causal, nan_memory):
    for length in lengths:
        check(inputs_of(1, length, 5, width, state=causal), activation="silu", causal=causal)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
@pytest.mark.parametrize("channels", [1, 8, 24])
def test_any_layout_and_no_bias(layout, channels, nan_memory):
    inputs = inputs_of(2, 21, channels, 4, bias=False, state=True, layout=layout)
    inputs["weight"] = inputs["weight"].mT.contiguous().mT
    check(inputs, activation="silu")


@pytest.mark.parametrize(
    "spread", [lambda g: g.mT.contiguous().mT, lambda g: torch.cat([g, g], -1)[..., g.shape[-1] :]]
)
def test_gradients_that_arrive_in_any_layout(spread):
    x, weight, bias, state = (leaf.requires_grad_() for leaf in inputs_of(2, 21, 24, 4, state=True).values())
    out, after = convolve(x, weight, bias, state=state, activation="silu")
    cotangents = draw(*out.shape, seed=1, device=DEVICE), draw(*after.shape, seed=2, device=DEVICE)
    expected = torch.autograd.grad((out, after), (x, weight, bias, state), cotangents, retain_graph=True)
    actual = torch.autograd.grad((out, after), (x, weight, bias, state), [spread(c) for c in cotangents])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_gradients_of_one_result_alone():
    leaves = [leaf.requires_grad_() for leaf in inputs_of(2, 2, 5, 4, state=True).values()]
    out, after = convolve(*leaves[:3], state=leaves[3])
    dx, dweight, dbias, dstate = torch.autograd.grad(after.sum(), leaves, retain_graph=True)
    assert (dx == 1).all()
    assert not dweight.any()
    assert not dbias.any()
    assert torch.equal(dstate.sum((0, 2)), torch.tensor([0.0, 0.0, 10.0], device=DEVICE))  # one older input is left
    expected = torch.autograd.grad(plain(*leaves[:3], state=leaves[3])[0].sum(), leaves)
    for a, b in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("width", [3, 4, 7])
def test_low_precision_is_within_the_budget(width, dtype, nan_memory):
    for causal in (True, False):
        errors = check(inputs_of(2, 67, 24, width, state=causal, dtype=dtype), causal=causal, activation="silu")
        assert errors["out"] <= torch.finfo(dtype).eps
        assert errors["grad weight"] <= 1e-5  # sums and their results stay in float32


def test_low_precision_weights_are_taken_and_give_gradients_of_their_dtype():
    inputs = inputs_of(2, 33, 5, 4, dtype=torch.float16)
    inputs |= {"weight": inputs["weight"].half(), "bias": inputs["bias"].half()}
    actual = values_and_gradients(functools.partial(convolve, activation="silu"), inputs)
    assert actual["grad weight"].dtype == actual["grad bias"].dtype == torch.float16
    check(inputs, activation="silu")


@settings(max_examples=4)
@given(data=st.data(), length=st.integers(1, 20), width=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_any_split_and_single_steps_equal_the_whole(data, length, width, seed):
    inputs = inputs_of(2, length, 3, width, state=True, seed=seed)
    cuts = data.draw(st.lists(st.integers(0, length), max_size=4))  # pieces may be shorter than W-1, or empty
    whole = values_and_gradients(functools.partial(convolve, activation="silu"), inputs)
    pieces = values_and_gradients(functools.partial(in_pieces, cuts, activation="silu"), inputs)
    steps = values_and_gradients(functools.partial(in_steps, activation="silu"), inputs)
    for parts in (pieces, steps):
        assert_same(parts, whole)
        assert torch.equal(parts["state"], whole["state"])


BOUNDS = (0, 0, 2, 30, 31, 31, 60, 60)  # empty, shorter than W-1, longer than a stretch


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("given_state", [False, True])
def test_packed_documents_get_the_bits_they_get_alone(given_state, width, nan_memory):
    inputs = inputs_of(1, 60, 24, width)
    if given_state:
        inputs["state"] = draw(7, width - 1, 24, seed=5, device=DEVICE)
    op = functools.partial(convolve, activation="silu")
    packed = values_and_gradients(functools.partial(op, cu_seqlens=ends(*BOUNDS)), inputs)
    assert packed["state"].shape == (7, width - 1, 24)
    dy, dafter = draw(1, 60, 24, seed=1000, device=DEVICE), draw(7, width - 1, 24, seed=1001, device=DEVICE)
    shared = torch.zeros_like(inputs["weight"]), torch.zeros_like(inputs["bias"])
    for n, (start, stop) in enumerate(itertools.pairwise(BOUNDS)):
        leaves = [inputs["x"][:, start:stop], inputs["weight"], inputs["bias"]]
        leaves += [inputs["state"][n : n + 1]] if given_state else []
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out, after = op(*leaves[:3], state=leaves[3] if given_state else None)
        assert torch.equal(packed["out"][:, start:stop], out)
        assert torch.equal(packed["state"][n : n + 1], after)
        dx, dweight, dbias, *dstate = torch.autograd.grad((out, after), leaves, (dy[:, start:stop], dafter[n : n + 1]))
        assert torch.equal(packed["grad x"][:, start:stop], dx)
        if given_state:
            assert torch.equal(packed["grad state"][n : n + 1], dstate[0])
        shared[0].add_(dweight)
        shared[1].add_(dbias)
    torch.testing.assert_close(packed["grad weight"], shared[0])
    torch.testing.assert_close(packed["grad bias"], shared[1])


def test_many_documents_of_every_length():
    lengths = [(7 * n) % 13 for n in range(40)]  # 0 to 12, around one stretch
    bounds = [0, *itertools.accumulate(lengths)]
    inputs = inputs_of(1, bounds[-1], 5, 3)
    out, after = convolve(**inputs, cu_seqlens=ends(*bounds))
    expected, expected_after = convolve(**inputs, cu_seqlens=ends(*bounds), impl="reference")
    torch.testing.assert_close(out, expected)
    assert torch.equal(after, expected_after)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy
@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_a_document_never_reaches_its_neighbours(poison):
    inputs = inputs_of(1, 60, 5, 4, bias=False)
    op = functools.partial(convolve, cu_seqlens=ends(0, 27, 60), activation="silu")
    clean = values_and_gradients(op, inputs)
    inputs["x"][:, 10:27] = poison
    dirty = values_and_gradients(op, inputs)
    for name in ("out", "grad x"):
        assert torch.equal(clean[name][:, 27:], dirty[name][:, 27:]), name
    assert torch.equal(clean["state"][1], dirty["state"][1])


@pytest.mark.parametrize("width", [2, 4, 7])
def test_the_past_stays_bit_equal_when_the_future_changes(width):
    inputs = inputs_of(2, 40, 5, width)
    out, _ = convolve(**inputs, activation="silu")
    for t in (0, 1, 7, 8, 38):
        x = inputs["x"].clone()
        x[:, t + 1 :] = float("nan")
        other, _ = convolve(**inputs | {"x": x}, activation="silu")
        assert torch.equal(out[:, : t + 1], other[:, : t + 1])
        assert other[:, t + 1 :].isnan().all()


def test_the_state_that_is_given_stays_and_the_one_returned_is_new():
    x, weight, state = inputs_of(2, 10, 5, 4, bias=False, state=True).values()
    kept = state.clone()
    _, after = convolve(x, weight, state=state)
    _, stepped = short_conv_step(x[:, 0], weight, state=state, impl="triton")
    assert torch.equal(state, kept)
    assert torch.equal(after, x[:, 7:])
    assert torch.equal(stepped, torch.cat([state[:, 1:], x[:, :1]], dim=1))
    assert after.untyped_storage().nbytes() == after.nbytes  # it does not keep the whole input alive


def test_two_runs_give_the_same_bits():
    inputs = inputs_of(2, 150, 140, 4, state=True)
    op = functools.partial(convolve, activation="silu")
    assert_equal(values_and_gradients(op, inputs), values_and_gradients(op, inputs))


@pytest.mark.parametrize("shape", [(2, 0, 5), (0, 3, 5), (2, 3, 0)])
def test_nothing_to_do(shape, nan_memory):
    inputs = inputs_of(*shape, 4, state=True)
    actual = values_and_gradients(functools.partial(convolve, activation="silu"), inputs)
    assert_equal(actual, values_and_gradients(functools.partial(plain, activation="silu"), inputs))


def test_autocast_changes_nothing():
    inputs = inputs_of(2, 20, 5, 4)
    out, _ = convolve(**inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(convolve(**inputs)[0], out)


def op_arguments(causal, state):
    inputs = inputs_of(2, 20, 5, 4, state=state)
    leaves = [leaf.requires_grad_() for leaf in inputs.values()]
    return *leaves, *([] if state else [None]), None, causal, True, causal


@pytest.mark.parametrize(("causal", "state"), [(True, True), (True, False), (False, False)])
def test_ops_are_registered_as_torch_wants_them(causal, state):
    arguments = op_arguments(causal, state)
    torch.library.opcheck(forward_op, arguments)
    plain_arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments[:-1]]
    dy = draw(2, 20, 5, seed=1, device=DEVICE)
    dstate = draw(2, 3, 5, seed=2, device=DEVICE) if causal else None
    torch.library.opcheck(backward_op, (dy, dstate, *plain_arguments))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("causal", [True, False])
def test_compiles_without_graph_breaks(causal, backend):
    inputs = inputs_of(2, 20, 5, 4, state=causal)
    op = functools.partial(short_conv, causal=causal, return_state=causal, activation="silu", impl="triton")
    compiled = torch.compile(op, fullgraph=True, backend=backend)
    assert_same(values_and_gradients(compiled, inputs), values_and_gradients(op, inputs))


def test_step_compiles_without_graph_breaks():
    inputs = inputs_of(2, 1, 5, 4, state=True)
    inputs["x"] = inputs["x"][:, 0]
    op = functools.partial(short_conv_step, impl="triton")
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_same(values_and_gradients(compiled, inputs), values_and_gradients(op, inputs))


def test_a_second_derivative_is_refused():
    x, weight, bias = (leaf.requires_grad_() for leaf in inputs_of(1, 9, 3, 4).values())
    out, _ = convolve(x, weight, bias)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative: use impl='reference'"):
        dx.sum().backward()


def test_what_the_kernels_cannot_do_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"float32 and x is float64: use impl='reference'"):
        convolve(**inputs_of(1, 9, 3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="at most 32 taps and weight has 33: use impl='reference', or long_conv"):
        convolve(**inputs_of(1, 9, 3, 33))


@pytest.mark.parametrize("table", [fused.FORWARD, fused.BACKWARD])
def test_every_width_has_a_tile(table):
    assert [*table] == sorted(table)
    assert [*table][-1] == fused.MOST_TAPS
    for widest, tile in table.items():
        assert (fused.SHORTEST * max(widest // 2 + 1, 4)) >= tile.unroll  # a stretch is a multiple of a turn


@pytest.mark.gpu
def test_auto_on_a_gpu_is_triton():
    inputs = inputs_of(2, 100, 24, 4)
    with torch.profiler.profile() as profile:
        short_conv(**inputs)
    assert any(event.key == "chela::short_conv" for event in profile.key_averages())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("sizes", "width"), [((1, 65_536 + 131, 24), 4), ((64, 2048, 128), 4), ((3, 14_113, 200), 31), ((2, 4099, 40), 16)]
)
def test_large_inputs_are_within_the_budget_and_deterministic(sizes, width, dtype, nan_memory):
    inputs = inputs_of(*sizes, width, state=True, dtype=dtype)
    check(inputs, activation="silu")
    op = functools.partial(convolve, activation="silu")
    assert_equal(values_and_gradients(op, inputs), values_and_gradients(op, inputs))


@pytest.mark.gpu
def test_more_than_two_thousand_million_entries():
    x = torch.zeros(1, 1_100_000, 2048, dtype=torch.bfloat16, device="cuda")
    x[0, -300:] = draw(300, 2048, seed=1, dtype=torch.bfloat16, device="cuda")
    weight = inputs_of(1, 1, 2048, 4, bias=False)["weight"]
    out, after = convolve(x, weight, activation="silu")
    expected, _ = plain(x[:, -300:].float(), weight, activation="silu")
    assert not out[:, :-300].any()
    torch.testing.assert_close(out[:, -300:].float(), expected, rtol=1e-2, atol=1e-3)
    assert torch.equal(after, x[:, -3:])


@pytest.mark.gpu
def test_no_length_or_batch_is_compiled_anew():
    def compiled():
        return sum(
            len(kernel.device_caches[0][0])
            for kernel in (kernels.short_conv_forward, kernels.short_conv_backward, kernels.sum_partials)
        )

    op = functools.partial(convolve, activation="silu")
    counts = []
    for n in range(50):
        values_and_gradients(op, inputs_of(1 + n % 7, 1 + 83 * n, 40, 4, state=True, dtype=torch.bfloat16))
        counts.append(compiled())
    assert len({*counts}) == 1, counts
