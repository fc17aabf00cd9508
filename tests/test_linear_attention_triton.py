"""The Triton implementation of linear attention: in Triton's interpreter without a GPU, on it with one."""

import functools
import itertools
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

pytest.importorskip("triton")

from chela.ops import linear_attention, linear_attention_step
from chela.ops.linear_attention import plan
from chela.ops.linear_attention.reference import bidirectional, chunked, quadratic
from chela.ops.random_inputs import draw, linear_attention_inputs
from chela.ops.testing import check_op, relative_error, values_and_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
attend: Any = functools.partial(linear_attention, return_state=True, impl="triton")
step: Any = functools.partial(linear_attention_step, impl="triton")
ops = torch.ops.chela


def plain(q, k, v, state=None, decay=None, *, scale=1.0, causal=True, silu=False) -> tuple[Any, Any]:
    """The blocked form in the precision of q."""
    q, v = q * scale, F.silu(v) if silu else v
    if not causal:
        return bidirectional(q, k, v), None
    carried: Any = (None if x is None else x.to(q.dtype) for x in (state, decay))
    return chunked(q, k, v, *carried)


def check(inputs, **options):
    causal = options.get("causal", True)
    op = functools.partial(linear_attention, return_state=causal, impl="triton", **options)
    draws = (6 if DEVICE == "cpu" else 4) if "decay" in inputs else 3
    return check_op(op, functools.partial(plain, **options), inputs, draws=draws)


def inputs_of(*sizes, **options):
    return linear_attention_inputs(*sizes, device=DEVICE, **options)


def ends(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_same(actual, expected, tolerance=1e-5):
    """To rounding in float32; the gradient of a decay is a sum over all tokens whose terms cancel."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert relative_error(actual[name], value) <= tolerance, name


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def in_pieces(cuts, q, k, v, state=None, **options):
    outs = []
    for start, stop in itertools.pairwise([0, *sorted(cuts), q.shape[1]]):
        out, state = attend(q[:, start:stop], k[:, start:stop], v[:, start:stop], state=state, **options)
        outs.append(out)
    return torch.cat(outs, dim=1), state


def in_steps(q, k, v, state, **options):
    outs = []
    for t in range(q.shape[1]):
        out, state = step(q[:, t], k[:, t], v[:, t], state, **options)
        outs.append(out)
    return torch.stack(outs, dim=1), state


@pytest.fixture
def processors(monkeypatch):
    """Sets the number of multiprocessors that work is cut for."""

    def cut_for(number):
        monkeypatch.setattr(plan, "multiprocessors", lambda device: number)

    return cut_for


LENGTHS = (1, 2, 63, 64, 65, 131)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("decay", [False, True])
def test_values_states_and_gradients_are_within_the_budget(decay, state, dtype, nan_memory):
    for length in LENGTHS:
        check(inputs_of(1, length, 2, 16, 16, decay=decay, state=state, dtype=dtype), scale=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 131])
def test_sums_over_all_tokens_are_within_the_budget(length, dtype, nan_memory):
    check(inputs_of(1, length, 2, 24, 40, dtype=dtype), causal=False, scale=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("length", "key", "value"), [(1, 24, 40), (131, 24, 40), (67, 40, 520)])
def test_values_behind_silu(length, key, value, dtype, nan_memory):
    check(inputs_of(1, length, 2, key, value, dtype=dtype, layout="sliced"), causal=False, scale=0.3, silu=True)
    if value < 100:
        check(inputs_of(1, length, 2, key, value, dtype=dtype, state=True), silu=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize(("key", "value"), [(24, 40), (16, 80), (1, 3), (80, 16)])
def test_widths_that_fill_no_tile(key, value, decay, dtype, nan_memory):
    check(inputs_of(1, 131, 2, key, value, decay=decay, state=True, dtype=dtype))


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize(("key", "value"), [(200, 48), (256, 16), (16, 272), (100, 260)])
def test_the_widest(key, value, decay, nan_memory):
    """Keys up to 256, values without limit."""
    check(inputs_of(1, 70, 1, key, value, decay=decay, state=True, dtype=torch.float16))
    check(inputs_of(1, 33, 1, key, value, decay=decay, state=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("number", [3, 8])
def test_rows_split_over_the_multiprocessors(number, decay, dtype, processors, nan_memory):
    processors(number)
    assert all(p.splits > 1 for p in plan.plans(1, 333, 24, 40, dtype, torch.device(DEVICE), decays=decay))
    for length, state in ((333, True), (65, False), (1, True)):
        check(inputs_of(1, length, 1, 24, 40, decay=decay, state=state, dtype=dtype), scale=0.7)


@pytest.mark.parametrize(
    ("number", "length", "value", "forward_splits"),
    [(1, 2118, 16, 1), (2, 2118, 64, 1), (2, 4400, 16, 4)],
    ids=["one split", "split backwards alone", "splits that begin within a period"],
)
def test_states_saved_within_a_split(number, length, value, forward_splits, processors, nan_memory):
    """One walk back, for which the forward pass saves more states than it has splits or where none begins."""
    processors(number)
    forward, back = plan.plans(1, length, 16, value, torch.float16, torch.device(DEVICE))
    assert back.one_walk
    assert forward.splits == forward_splits
    assert back.slots(length) > min(forward_splits, back.splits)
    check(inputs_of(1, length, 1, 16, value, state=True, dtype=torch.float16))


def test_states_saved_within_packed_documents(processors, nan_memory):
    processors(1)
    pairs = [*itertools.pairwise(bounds := (0, 1100, 1101, 2500))]

    def apart(q, k, v):
        outs, states = zip(*(plain(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in pairs), strict=True)
        return torch.cat(outs, dim=1), torch.cat(states)

    op = functools.partial(attend, cu_seqlens=ends(*bounds))
    check_op(op, apart, inputs_of(1, 2500, 1, 16, 24, dtype=torch.float16))


@pytest.mark.parametrize("number", [1, 8])
def test_sums_over_all_tokens_split_over_the_multiprocessors(number, processors, nan_memory):
    processors(number)
    check(inputs_of(1, 333, 1, 24, 40), causal=False)


@pytest.mark.parametrize("value", [90, 200, 520])
def test_sums_over_all_tokens_of_wide_values_held_in_blocks_or_not_at_all(value, nan_memory):
    assert 200 <= plan.MOST_HELD < 520
    check(inputs_of(1, 67, 1, 40, value), causal=False)


@pytest.mark.parametrize("decay", [False, True])
def test_a_scale_of_zero_gives_zeros(decay, nan_memory):
    check(inputs_of(1, 65, 2, 16, 24, decay=decay, state=True), scale=0.0)
    values = values_and_gradients(functools.partial(attend, scale=0.0), inputs_of(1, 65, 2, 16, 24, state=True))
    assert not values["out"].any()
    assert not values["grad q"].any()
    assert values["grad v"].any()  # through the state
    check(inputs_of(1, 65, 2, 16, 24), scale=0.0, causal=False)


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("key", "value"), [(16, 24), (5, 7)])
def test_any_layout(key, value, causal, layout, nan_memory):
    check(inputs_of(2, 67, 2, key, value, decay=causal, state=causal, layout=layout), causal=causal)


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize(
    "spread", [lambda g: g.mT.contiguous().mT, lambda g: torch.cat([g, g], -1)[..., g.shape[-1] :]]
)
def test_gradients_that_arrive_in_any_layout(spread, decay):
    inputs = inputs_of(2, 67, 2, 5, 24, decay=decay, state=True)
    leaves = [leaf.requires_grad_() for leaf in inputs.values()]
    out, after = attend(**inputs)
    cotangents = draw(*out.shape, seed=1, device=DEVICE), draw(*after.shape, seed=2, device=DEVICE)
    expected = torch.autograd.grad((out, after), leaves, cotangents, retain_graph=True)
    actual = torch.autograd.grad((out, after), leaves, [spread(c) for c in cotangents])
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("decay", [False, True])
def test_gradients_of_one_result_alone(decay):
    inputs = inputs_of(2, 67, 2, 5, 7, decay=decay, state=True)
    leaves = [leaf.requires_grad_() for leaf in inputs.values()]
    for one in (0, 1):
        expected = torch.autograd.grad(plain(**inputs)[one].sum(), leaves, materialize_grads=True)
        actual = torch.autograd.grad(attend(**inputs)[one].sum(), leaves, materialize_grads=True)
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a, b) < 1e-5


def test_parts_that_need_no_gradient_change_none_of_the_others():
    inputs = inputs_of(2, 67, 2, 5, 7, decay=True, state=True)
    everything = values_and_gradients(attend, inputs)
    for name in ("q", "decay"):
        rest = {other: x for other, x in inputs.items() if other != name}
        fixed = values_and_gradients(functools.partial(attend, **{name: inputs[name]}), rest)
        assert_equal(fixed, {kept: everything[kept] for kept in everything if kept != f"grad {name}"})


BOUNDS = (0, 0, 70, 71, 71, 135, 150, 150)  # documents 1, 4 and 7 are empty; one is a whole chunk


@pytest.mark.parametrize("given_state", [False, True])
@pytest.mark.parametrize("decay", [False, True])
def test_packed_documents_get_the_bits_they_get_alone(decay, given_state, processors, nan_memory):
    processors(1)  # how often a row is split follows from the whole batch, and sums split elsewhere round elsewhere
    inputs = inputs_of(1, 150, 2, 16, 24, decay=decay)
    rates = inputs.pop("decay", None)
    op = functools.partial(attend, decay=rates)
    if given_state:
        inputs["state"] = draw(7, 2, 16, 24, seed=5, device=DEVICE)
    packed = values_and_gradients(functools.partial(op, cu_seqlens=ends(*BOUNDS)), inputs)
    assert packed["state"].shape == (7, 2, 16, 24)
    d_out, d_after = draw(1, 150, 2, 24, seed=1000, device=DEVICE), draw(7, 2, 16, 24, seed=1001, device=DEVICE)
    for n, (start, stop) in enumerate(itertools.pairwise(BOUNDS)):
        document = {name: inputs[name][:, start:stop] for name in "qkv"}
        if given_state:
            document["state"] = inputs["state"][n : n + 1]
        document = {name: x.detach().requires_grad_() for name, x in document.items()}
        out, after = op(**document)
        assert torch.equal(packed["out"][:, start:stop], out)
        assert torch.equal(packed["state"][n : n + 1], after)
        gradients = torch.autograd.grad(
            (out, after), [*document.values()], (d_out[:, start:stop], d_after[n : n + 1]), materialize_grads=True
        )
        for name, gradient in zip(document, gradients, strict=True):
            whole = packed[f"grad {name}"]
            assert torch.equal(whole[n : n + 1] if name == "state" else whole[:, start:stop], gradient), name


@pytest.mark.parametrize("number", [1, 8])
def test_packed_documents_and_the_gradient_of_their_decay(number, processors, nan_memory):
    processors(number)
    inputs = inputs_of(1, 150, 2, 16, 24, decay=True) | {"state": draw(7, 2, 16, 24, seed=5, device=DEVICE)}
    op = functools.partial(linear_attention, return_state=True, cu_seqlens=ends(*BOUNDS))
    expected = values_and_gradients(functools.partial(op, impl="reference"), inputs)
    assert_same(values_and_gradients(functools.partial(op, impl="triton"), inputs), expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(("number", "poison"), [(1, float("nan")), (8, float("nan")), (8, 1e30)])
@pytest.mark.parametrize("decay", [False, True])
def test_a_document_never_reaches_its_neighbours(decay, number, poison, processors):
    processors(number)
    inputs = inputs_of(1, 150, 2, 5, 7)
    rates = torch.tensor([0.9, 1.0], device=DEVICE) if decay else None
    op = functools.partial(attend, decay=rates, cu_seqlens=ends(0, 30, 70, 150))
    clean = values_and_gradients(op, inputs)
    for name in inputs:
        inputs[name][:, 30:70] = poison
    dirty = values_and_gradients(op, inputs)
    for name in ("out", "grad q", "grad k", "grad v"):
        for others in (slice(0, 30), slice(70, 150)):
            assert torch.equal(clean[name][:, others], dirty[name][:, others]), name
    assert torch.equal(clean["state"][[0, 2]], dirty["state"][[0, 2]])


@settings(max_examples=4)
@given(data=st.data(), length=st.integers(1, 140), decay=st.booleans(), seed=st.integers(0, 99))
def test_any_split_in_time_equals_the_whole(data, length, decay, seed):
    inputs = inputs_of(1, length, 2, 5, 7, decay=decay, state=True, seed=seed)
    cuts = data.draw(st.lists(st.integers(0, length), max_size=4))  # a piece may be empty
    whole = values_and_gradients(functools.partial(attend, scale=0.7), inputs)
    assert_same(values_and_gradients(functools.partial(in_pieces, cuts, scale=0.7), inputs), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize(("key", "value"), [(5, 7), (80, 272)])
def test_steps_equal_the_whole(key, value, decay, dtype, nan_memory):
    inputs = inputs_of(1, 3, 2, key, value, decay=decay, state=True, dtype=dtype)
    check_op(functools.partial(in_steps, scale=0.3), functools.partial(plain, scale=0.3), inputs, draws=8)


def one_token(*sizes, **options):
    inputs = inputs_of(sizes[0], 1, *sizes[1:], **options)
    return inputs | {name: inputs[name][:, 0] for name in "qkv"}


def test_a_step_leaves_the_state_it_was_given_unless_told_to_write_there():
    inputs = one_token(2, 3, 5, 7, state=True)
    before = inputs["state"].clone()
    out, after = step(**inputs)
    assert torch.equal(inputs["state"], before)
    with pytest.raises(ValueError, match=r"call the step under torch.no_grad\(\)"):
        step(**inputs | {"q": inputs["q"].requires_grad_()}, inplace=True)
    with torch.no_grad():
        out_again, kept = step(**inputs, inplace=True)
    assert kept is inputs["state"]
    assert torch.equal(out_again, out)
    assert torch.equal(kept, after)


@pytest.mark.parametrize("number", [1, 8])
@pytest.mark.parametrize("decay", [False, True])
def test_the_past_stays_bit_equal_when_the_future_changes(decay, number, processors):
    processors(number)
    inputs = inputs_of(1, 150, 2, 5, 7, decay=decay)
    out, _ = attend(**inputs)
    for t in (0, 63, 64, 100):
        changed = {name: tensor.clone() for name, tensor in inputs.items()}
        for name in "qkv":
            changed[name][:, t + 1 :] = 1e3 * draw(1, 149 - t, *inputs[name].shape[2:], seed=9)
        other, _ = attend(**changed)
        assert torch.equal(out[:, : t + 1], other[:, : t + 1])
        assert not torch.equal(out[:, t + 1 :], other[:, t + 1 :])


@pytest.mark.parametrize("number", [1, 8])
@pytest.mark.parametrize("causal", [True, False])
def test_two_runs_give_the_same_bits(causal, number, processors):
    processors(number)
    inputs = inputs_of(1, 200, 2, 16, 24, decay=causal, state=causal)
    op = functools.partial(linear_attention, causal=causal, return_state=causal, impl="triton")
    assert_equal(values_and_gradients(op, inputs), values_and_gradients(op, inputs))


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("sizes", [(2, 0, 2, 5, 7), (0, 3, 2, 5, 7), (2, 3, 0, 5, 7)])
def test_nothing_to_do(sizes, decay, nan_memory):
    inputs = inputs_of(*sizes, state=True, decay=decay)

    assert_equal(values_and_gradients(attend, inputs), values_and_gradients(quadratic, inputs))
    both_ways = functools.partial(linear_attention, causal=False, impl="triton")
    inputs = inputs_of(*sizes)
    assert_equal(
        values_and_gradients(both_ways, inputs), values_and_gradients(functools.partial(plain, causal=False), inputs)
    )
    assert not attend(**inputs)[1].any()


def test_tiny_decays_stay_finite_and_a_decay_of_one_is_none(nan_memory):
    inputs = inputs_of(1, 150, 3, 5, 7, state=True)
    ones = values_and_gradients(attend, inputs | {"decay": torch.ones(3, device=DEVICE)})
    ones.pop("grad decay")
    assert_same(ones, values_and_gradients(attend, inputs))
    tiny = inputs | {"decay": torch.tensor([1e-30, 1e-3, 0.9], device=DEVICE)}
    expected = values_and_gradients(functools.partial(linear_attention, return_state=True, impl="reference"), tiny)
    assert_same(values_and_gradients(attend, tiny), expected)


def test_autocast_changes_nothing():
    inputs = inputs_of(1, 70, 2, 5, 7)
    out, state = attend(**inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside, inside_state = attend(**inputs)
    assert torch.equal(out, inside)
    assert torch.equal(state, inside_state)


def test_what_the_kernels_cannot_do_is_refused_in_one_line():
    wide = {name: x.double() for name, x in inputs_of(1, 9, 1, 8, 8).items()}
    refused = [
        (lambda: attend(**wide), "sum in float32: for float64 inputs use impl='reference'"),
        (lambda: attend(**wide, causal=False, return_state=False), "for float64 inputs use impl='reference'"),
        (lambda: attend(**inputs_of(1, 9, 1, 257, 8)), "up to K = 256; got 257: use more heads or impl='reference'"),
        (lambda: step(**one_token(1, 1, 257, 8, state=True)), "up to K = 256; got 257"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message) as refusal:
            call()
        assert "\n" not in str(refusal.value)


def leaves_of(inputs) -> list[Any]:
    return [inputs[name].requires_grad_() if name in inputs else None for name in ("q", "k", "v", "decay", "state")]


def detached(arguments):
    return [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]


@pytest.mark.parametrize(
    ("decay", "state", "dtype", "number"), [(False, False, torch.float32, 1), (True, True, torch.float16, 8)]
)
def test_the_causal_ops_are_registered_as_torch_wants_them(decay, state, dtype, number, processors):
    processors(number)
    arguments = (*leaves_of(inputs_of(1, 70, 1, 16, 24, decay=decay, state=state, dtype=dtype)), None, 0.5)
    op, backward_op = ops.linear_attention_causal.default, ops.linear_attention_causal_backward.default
    torch.library.opcheck(op, (*arguments, True, True))
    torch.library.opcheck(op, (*detached(arguments), False, False))
    q, k, v, *carried = detached(arguments)
    _, _, saved = op(q, k, v, *carried, True, True)
    grad, end_grad = draw(1, 70, 1, 24, seed=1, dtype=dtype, device=DEVICE), draw(1, 1, 16, 24, seed=2, device=DEVICE)
    for grads in ((grad, end_grad), (grad, None), (None, end_grad)):
        torch.library.opcheck(backward_op, (*grads, q, k, v, saved, *carried))


def test_the_causal_op_is_registered_for_packed_documents():
    q, k, v, rates, _ = leaves_of(inputs_of(1, 150, 2, 16, 24, decay=True))
    state = draw(7, 2, 16, 24, seed=5, device=DEVICE).requires_grad_()
    torch.library.opcheck(ops.linear_attention_causal.default, (q, k, v, rates, state, ends(*BOUNDS), 1.0, True, True))


def test_the_other_ops_are_registered_as_torch_wants_them():
    q, k, v, rates, state = leaves_of(inputs_of(2, 70, 2, 16, 24, decay=True, state=True))
    torch.library.opcheck(ops.linear_attention_bidirectional.default, (q, k, v, 0.5, True))
    total = torch.einsum("bthk,bthv->bhkv", k, v).detach()
    grad = draw(2, 70, 2, 24, seed=1, device=DEVICE)
    torch.library.opcheck(
        ops.linear_attention_bidirectional_backward.default,
        (grad, q.detach(), k.detach(), v.detach(), total, 0.5, True),
    )
    token = [x.detach()[:, 0].requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.linear_attention_step.default, (*token, state, rates, 0.5))
    torch.library.opcheck(ops.linear_attention_step.default, (*token, state, None, 0.5))
    torch.library.opcheck(ops.linear_attention_step_.default, (*detached((*token, state, rates)), 0.5))


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
def test_compiles_without_graph_breaks(causal, backend):
    inputs = inputs_of(2, 70, 2, 16, 24, decay=causal, state=causal)
    op = functools.partial(linear_attention, causal=causal, return_state=causal, scale=0.5, impl="triton")
    compiled = torch.compile(op, fullgraph=True, backend=backend)
    assert_same(values_and_gradients(compiled, inputs), values_and_gradients(op, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_compile_without_graph_breaks(backend):
    inputs = inputs_of(1, 150, 2, 16, 24)
    op = functools.partial(attend, cu_seqlens=ends(*BOUNDS))
    compiled = torch.compile(op, fullgraph=True, backend=backend)
    assert_same(values_and_gradients(compiled, inputs), values_and_gradients(op, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_compiles_without_graph_breaks(backend):
    inputs = one_token(2, 2, 16, 24, decay=True, state=True)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    assert_same(values_and_gradients(compiled, inputs), values_and_gradients(step, inputs))


@pytest.mark.gpu
def test_auto_on_a_gpu_is_triton():
    inputs = inputs_of(2, 100, 2, 16, 24)
    with torch.profiler.profile() as profile:
        linear_attention(**inputs)
    assert any(event.key == "chela::linear_attention_causal" for event in profile.key_averages())


# One length after the other at one width: a width is compiled once and serves them all.
WIDTHS = [(16, 512), (24, 96), (64, 64), (64, 256), (80, 16), (96, 256), (128, 128), (128, 512), (256, 64), (256, 512)]


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize(("key", "value"), WIDTHS)
def test_bfloat16_at_many_sizes_is_within_the_budget_and_deterministic(key, value, decay, nan_memory):
    for length in (1, 2, 63, 64, 65, 1000, 4099, 65_537):
        rows = 1 if length > 65_536 else 2
        inputs = inputs_of(1, length, rows, key, value, decay=decay, state=True, dtype=torch.bfloat16)
        check(inputs)
    assert_equal(values_and_gradients(attend, inputs), values_and_gradients(attend, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(64, 2048, 8, 64, 64), (8, 2048, 1, 64, 256)])
def test_many_rows_are_within_the_budget(sizes, dtype, nan_memory):
    check(inputs_of(*sizes, state=True, dtype=dtype))
    check(inputs_of(*sizes, dtype=dtype), causal=False)
    check(inputs_of(*sizes, dtype=dtype), causal=False, silu=True)


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [False, True])
def test_packed_documents_on_a_gpu_are_the_documents_alone(decay, nan_memory):
    bounds = (0, 5000, 5001, 5001, 9000, 20_000)
    inputs = inputs_of(1, 20_000, 2, 64, 64, decay=decay)
    op = functools.partial(linear_attention, return_state=True, cu_seqlens=ends(*bounds))
    expected = values_and_gradients(functools.partial(op, impl="reference"), inputs)
    assert_same(values_and_gradients(functools.partial(op, impl="triton"), inputs), expected, 1e-4)


@pytest.mark.gpu
def test_step_under_a_cuda_graph():
    inputs = inputs_of(2, 20, 2, 64, 64, decay=True, state=True, dtype=torch.bfloat16)
    expected, expected_state = in_steps(**inputs)
    token = {name: inputs[name][:, 0].clone() for name in "qkv"}
    state = inputs["state"].clone()
    advance = functools.partial(step, **token, state=state, decay=inputs["decay"], inplace=True)
    advance()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = advance()
    state.copy_(inputs["state"])
    for t in range(20):
        for name in "qkv":
            token[name].copy_(inputs[name][:, t])
        graph.replay()
        assert torch.equal(out, expected[:, t])
    assert torch.equal(state, expected_state)


def compilations():
    """Variants of all kernels of the op compiled so far."""
    modules = [module for name, module in sys.modules.items() if name.startswith("chela.ops.linear_attention.kernels")]
    kernels = {id(x): x for module in modules for x in vars(module).values() if hasattr(x, "device_caches")}
    return sum(len(kernel.device_caches[0][0]) for kernel in kernels.values())


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [False, True])
def test_no_length_batch_or_number_of_heads_is_compiled_anew(decay):
    """Two regimes may be compiled, that of few rows and that of many; both are met in the first ten calls."""
    counts = []
    for n in range(50):
        length = 1 + 83 * (n if n >= 10 else 5 * n)
        sizes = (1 + n % 7, length, 1 + n % 5) if n % 2 else (64, length % 300 + 1, 8)
        values_and_gradients(attend, inputs_of(*sizes, 64, 64, decay=decay, state=True, dtype=torch.bfloat16))
        counts.append(compilations())
    assert counts[0] > 0
    assert len({*counts[10:]}) == 1, counts


@pytest.mark.gpu
def test_memory_of_a_training_step():
    """The output and three gradients are 512 MiB here; beside them there are saved states, an eighth of an input."""
    inputs = inputs_of(8, 16_384, 8, 64, 64, dtype=torch.bfloat16)
    leaves = [leaf.requires_grad_() for leaf in inputs.values()]
    grad = torch.ones_like(inputs["v"])

    def train():
        torch.autograd.grad(linear_attention(**inputs)[0], leaves, grad)

    train()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train()
    assert torch.cuda.max_memory_allocated() - before <= (512 + 32) * 2**20


@pytest.mark.parametrize("causal", [True, False])
def test_a_second_derivative_is_refused(causal):
    q, k, v = (x.requires_grad_() for x in linear_attention_inputs(1, 5, 1, 16, 16, device=DEVICE).values())
    out, _ = linear_attention(q, k, v, causal=causal, impl="triton")
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative: use impl='reference'"):
        gradient.sum().backward()
