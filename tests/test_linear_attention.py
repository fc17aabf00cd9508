import functools
import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import jaxtyped

from chela.ops import linear_attention, linear_attention_step
from chela.ops.linear_attention import reference
from chela.ops.linear_attention.reference import bidirectional, chunked, quadratic, recurrent
from chela.ops.random_inputs import draw, linear_attention_inputs
from chela.ops.testing import check_op, relative_error, values_and_gradients

DOUBLE = torch.float64
LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, 193]
attend: Any = functools.partial(linear_attention, return_state=True, impl="reference")


def assert_same(actual, expected, tolerance=1e-10):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert relative_error(actual[name], value) <= tolerance, name


def in_pieces(cuts, q, k, v, state=None, decay=None, **options):
    outs = []
    for start, stop in itertools.pairwise([0, *sorted(cuts), q.shape[1]]):
        piece = slice(start, stop)
        out, state = attend(q[:, piece], k[:, piece], v[:, piece], state=state, decay=decay, **options)
        outs.append(out)
    return torch.cat(outs, dim=1), state


def in_steps(q, k, v, state, decay=None, **options):
    outs = []
    for t in range(q.shape[1]):
        out, state = linear_attention_step(q[:, t], k[:, t], v[:, t], state, decay=decay, impl="reference", **options)
        outs.append(out)
    return torch.stack(outs, dim=1), state


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_three_forms_agree_in_values_and_all_gradients(length, decay, state):
    inputs = linear_attention_inputs(2, length, 3, 5, 7, decay=decay, state=state, dtype=DOUBLE)
    expected = values_and_gradients(quadratic, inputs)
    assert expected.keys() == {"out", "state", *(f"grad {name}" for name in inputs)}
    for form in (recurrent, chunked, functools.partial(chunked, chunk=13)):
        assert_same(values_and_gradients(form, inputs), expected)


def test_quadratic_form_is_the_sum_of_the_docstring():
    q, k, v, decay, state = linear_attention_inputs(2, 6, 2, 3, 4, decay=True, state=True, dtype=DOUBLE).values()
    out, after = linear_attention(q, k, v, scale=0.3, decay=decay, state=state, return_state=True)
    for b, t, h in itertools.product(range(2), range(6), range(2)):
        past = [decay[h] ** (t - s) * (q[b, t, h] @ k[b, s, h]) * v[b, s, h] for s in range(t + 1)]
        expected = sum(past) + decay[h] ** (t + 1) * (q[b, t, h] @ state[b, h])
        torch.testing.assert_close(out[b, t, h], 0.3 * expected)
    kept = [decay[:, None, None] ** (5 - s) * k[:, s, :, :, None] * v[:, s, :, None, :] for s in range(6)]
    torch.testing.assert_close(after, sum(kept) + decay[:, None, None] ** 6 * state)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
@pytest.mark.parametrize("length", [1, 65])
def test_public_op_takes_any_layout(length, layout):
    inputs = linear_attention_inputs(2, length, 3, 5, 7, decay=True, state=True, dtype=DOUBLE, layout=layout)
    expected = values_and_gradients(lambda q, **rest: quadratic(0.25 * q, **rest), inputs)
    assert_same(values_and_gradients(functools.partial(attend, scale=0.25), inputs), expected)


@pytest.mark.parametrize("length", [1, 2, 65, 193])
def test_bidirectional_sums_over_all_tokens(length):
    inputs = linear_attention_inputs(2, length, 3, 5, 7, dtype=DOUBLE)

    def definition(q, k, v):
        return torch.einsum("bthk,bshk,bshv->bthv", 0.5 * q, k, v), None

    op = functools.partial(linear_attention, causal=False, scale=0.5)
    assert_same(values_and_gradients(op, inputs), values_and_gradients(definition, inputs))


@pytest.mark.parametrize("causal", [True, False])
def test_values_may_go_through_silu_first(causal):
    inputs = linear_attention_inputs(2, 67, 3, 5, 7, dtype=DOUBLE)

    def before(q, k, v):
        return linear_attention(q, k, torch.nn.functional.silu(v), causal=causal)

    op = functools.partial(linear_attention, causal=causal, silu=True)
    assert_same(values_and_gradients(op, inputs), values_and_gradients(before, inputs))


@given(data=st.data(), length=st.integers(1, 150), decay=st.booleans(), seed=st.integers(0, 99))
def test_any_split_and_single_steps_equal_the_whole(data, length, decay, seed):
    inputs = linear_attention_inputs(1, length, 2, 3, 4, decay=decay, state=True, dtype=DOUBLE, seed=seed)
    cuts = data.draw(st.lists(st.integers(0, length), max_size=5))  # a piece may be empty
    whole = values_and_gradients(functools.partial(attend, scale=0.7), inputs)
    assert_same(values_and_gradients(functools.partial(in_pieces, cuts, scale=0.7), inputs), whole)
    assert_same(values_and_gradients(functools.partial(in_steps, scale=0.7), inputs), whole)


def test_step_leaves_the_state_it_was_given():
    q, k, v, state = linear_attention_inputs(2, 1, 3, 5, 7, state=True).values()
    before = state.clone()
    linear_attention_step(q[:, 0], k[:, 0], v[:, 0], state)
    assert torch.equal(state, before)


@pytest.mark.parametrize("decay", [False, True])
def test_the_past_stays_bit_equal_when_the_future_changes(decay):
    inputs = linear_attention_inputs(2, 150, 3, 5, 7, decay=decay)
    out, _ = linear_attention(**inputs)
    for t in (0, 1, 63, 64, 100, 148):
        changed = {name: tensor.clone() for name, tensor in inputs.items()}
        for name in ("q", "k", "v"):
            changed[name][:, t + 1 :] = 1e3 * draw(2, 149 - t, *inputs[name].shape[2:], seed=9)
        other, _ = linear_attention(**changed)
        assert torch.equal(out[:, : t + 1], other[:, : t + 1])
        assert not torch.equal(out[:, t + 1 :], other[:, t + 1 :])


BOUNDS = torch.tensor([0, 0, 70, 71, 71, 150, 150], dtype=torch.int32)  # documents 1, 3 and 5 are empty


@pytest.mark.parametrize("given_state", [False, True])
def test_packed_documents_get_the_bits_they_get_alone(given_state):
    inputs = linear_attention_inputs(1, 150, 3, 5, 7, decay=True)
    if given_state:
        inputs["state"] = draw(6, 3, 5, 7, seed=5)
    packed = values_and_gradients(functools.partial(attend, cu_seqlens=BOUNDS), inputs)
    assert packed["state"].shape == (6, 3, 5, 7)
    for n, (start, stop) in enumerate(itertools.pairwise(BOUNDS.tolist())):
        q, k, v = (inputs[name][:, start:stop] for name in "qkv")
        before = inputs["state"][n : n + 1] if given_state else None
        out, after = attend(q, k, v, decay=inputs["decay"], state=before)
        assert torch.equal(packed["out"][:, start:stop], out)
        assert torch.equal(packed["state"][n : n + 1], after)
    if not given_state:
        assert (packed["state"][[0, 3, 5]] == 0).all()


@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_a_document_never_reaches_its_neighbours(poison):
    inputs = linear_attention_inputs(1, 150, 3, 5, 7)
    op = functools.partial(attend, cu_seqlens=torch.tensor([0, 70, 150], dtype=torch.int32))
    clean = values_and_gradients(op, inputs)
    for name in inputs:
        inputs[name][:, 40:70] = poison
    dirty = values_and_gradients(op, inputs)
    for name in ("out", "grad q", "grad k", "grad v"):
        assert torch.equal(clean[name][:, 70:], dirty[name][:, 70:]), name
        assert torch.isfinite(dirty[name][:, 70:]).all()
    assert torch.equal(clean["state"][1], dirty["state"][1])


def test_more_than_65536_tokens():
    inputs = linear_attention_inputs(1, 65_536 + 131, 1, 3, 2, dtype=DOUBLE)

    def running_sum(q, k, v):
        states = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(dim=1)  # [B, T, H, K, V]
        return torch.einsum("bthk,bthkv->bthv", q, states), states[:, -1]

    assert_same(values_and_gradients(attend, inputs), values_and_gradients(running_sum, inputs))


# In a process of its own, so that nothing measured before counts: the highest resident size (ru_maxrss) while the op
# runs, above that after its inputs were made and the op was warmed up on a few tokens.
MEMORY = """
import resource, sys
import torch
from chela.ops import linear_attention
from chela.ops.random_inputs import linear_attention_inputs

torch.set_num_threads(1)
def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def run(length, use_decay):
    inputs = linear_attention_inputs(1, length, 4, 64, 64, decay=use_decay)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    before = peak_mb()
    out, state = linear_attention(**leaves, return_state=True)
    (out.sum() + state.sum()).backward()
    return peak_mb() - before
run(256, True)
print(run(65536, sys.argv[1] == "decay"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["none", "decay"])
def test_memory_for_65536_tokens_with_gradients(decay):
    done = subprocess.run([sys.executable, "-c", MEMORY, decay], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2000


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_is_within_the_budget(dtype, causal):
    inputs = linear_attention_inputs(2, 193, 3, 16, 24, state=causal, decay=causal, dtype=dtype)

    def plain(q, k, v, **carried):
        if not causal:
            return bidirectional(q, k, v), None
        return chunked(q, k, v, **{name: tensor.to(q.dtype) for name, tensor in carried.items()})

    op = functools.partial(linear_attention, causal=causal, return_state=causal, impl="reference")
    errors = check_op(op, plain, inputs)
    # sums are float32: what is left is the rounding of the result (at most half an eps each) and of float32 sums
    assert errors["out"] <= max(torch.finfo(dtype).eps, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_on_a_gpu_is_within_the_budget_and_deterministic(dtype, nan_memory):
    inputs = linear_attention_inputs(2, 193, 3, 16, 24, state=True, decay=True, dtype=dtype, device="cuda")

    def plain(q, k, v, state, decay):
        return chunked(q, k, v, state.to(q.dtype), decay.to(q.dtype))

    check_op(attend, plain, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_summed_in_float32(dtype):
    inputs = linear_attention_inputs(2, 100, 3, 5, 7, state=True, dtype=dtype)
    out, state = attend(**inputs)
    wide_out, wide_state = attend(**{name: tensor.float() for name, tensor in inputs.items()})
    assert out.dtype == dtype
    assert state.dtype == torch.float32
    assert torch.equal(out, wide_out.to(dtype))
    assert torch.equal(state, wide_state)


def test_autocast_does_not_narrow_the_sums():
    inputs = linear_attention_inputs(2, 100, 3, 5, 7, state=True)
    out, state = attend(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, inside_state = attend(**inputs)
        stepped, _ = in_steps(**inputs)
    assert torch.equal(out, inside)
    assert torch.equal(state, inside_state)
    assert relative_error(stepped, out) < 1e-5


def test_decay_of_one_is_no_decay_and_a_tiny_one_stays_finite():
    inputs = linear_attention_inputs(2, 150, 3, 5, 7, state=True, dtype=DOUBLE)
    ones = values_and_gradients(attend, inputs | {"decay": torch.ones(3, dtype=DOUBLE)})
    ones.pop("grad decay")
    assert_same(ones, values_and_gradients(attend, inputs))
    narrow = {name: tensor.float() for name, tensor in inputs.items()}
    tiny = values_and_gradients(attend, narrow | {"decay": torch.tensor([1e-30, 1e-3, 0.9])})
    assert all(torch.isfinite(value).all() for value in tiny.values())


def test_a_token_with_a_zero_key_adds_nothing():
    q, k, v = linear_attention_inputs(1, 100, 2, 5, 7, dtype=DOUBLE).values()
    kept = torch.rand(100) < 0.5
    k = k * kept[:, None, None]
    for causal in (True, False):
        out, _ = linear_attention(q, k, v, causal=causal)
        alone, _ = linear_attention(q[:, kept], k[:, kept], v[:, kept], causal=causal)
        assert relative_error(out[:, kept], alone) < 1e-12


def test_no_tokens():
    q, k, v, state = linear_attention_inputs(2, 0, 3, 5, 7, state=True).values()
    out, after = attend(q, k, v, state=state)
    assert out.shape == (2, 0, 3, 7)
    assert torch.equal(after, state)
    assert torch.equal(attend(q, k, v)[1], torch.zeros(2, 3, 5, 7))


def test_gradients_are_the_derivatives():
    inputs = linear_attention_inputs(1, 5, 2, 2, 3, decay=True, state=True, dtype=DOUBLE)
    inputs["decay"] = torch.tensor([0.5, 0.9], dtype=DOUBLE)  # clear of 1, which numerical differences would pass
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def op(*tensors):
        return attend(**dict(zip(inputs, tensors, strict=True)))

    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


@pytest.mark.parametrize("decay", [False, True])
def test_compiles_without_graph_breaks(decay):
    inputs = linear_attention_inputs(2, 130, 2, 5, 7, decay=decay, state=True, dtype=DOUBLE)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_same(values_and_gradients(compiled, inputs), values_and_gradients(attend, inputs), 1e-14)


def test_step_compiles_without_graph_breaks():
    q, k, v, decay, state = linear_attention_inputs(2, 1, 3, 5, 7, decay=True, state=True).values()
    inputs = {"q": q[:, 0], "k": k[:, 0], "v": v[:, 0], "state": state, "decay": decay}
    compiled = torch.compile(linear_attention_step, fullgraph=True, backend="aot_eager")
    assert_same(values_and_gradients(compiled, inputs), values_and_gradients(linear_attention_step, inputs), 1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_exports(causal):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return linear_attention(q, k, v, causal=causal)[0]

    inputs = tuple(linear_attention_inputs(2, 100, 2, 5, 7).values())
    program = torch.export.export(Module(), inputs)
    assert torch.equal(program.module()(*inputs), Module()(*inputs))


@pytest.mark.parametrize("form", [quadratic, recurrent, chunked])
def test_annotated_shapes_hold(form):
    beartype = pytest.importorskip("beartype").beartype
    inputs = linear_attention_inputs(2, 70, 3, 5, 7, decay=True, state=True)
    jaxtyped(form, typechecker=beartype)(**inputs)
    checked = jaxtyped(linear_attention, typechecker=beartype)
    checked(**inputs, return_state=True)
    checked(*(inputs[name] for name in "qkv"), causal=False)


GOOD: dict[str, Any] = linear_attention_inputs(2, 10, 3, 5, 7, decay=True, state=True)
ENDS = torch.tensor([0, 4, 10], dtype=torch.int32)
PACKED: dict[str, Any] = {name: GOOD[name][:1] for name in "qkv"} | {"state": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": GOOD["k"][..., :4]}, "q and k must share one shape"),
        ({"v": GOOD["v"][:, :9]}, "v their first axes"),
        ({"q": GOOD["q"][0]}, r"got q \[10, 3, 5\]"),
        ({"v": GOOD["v"].half()}, "v must have the dtype of q"),
        ({"q": GOOD["q"].int()}, "q must be a floating-point tensor"),
        ({"k": GOOD["k"].to("meta")}, "k must be on the device of q, cpu; got meta"),
        ({"decay": GOOD["decay"][:2]}, r"decay must be \[H\] = \[3\]; got \[2\]"),
        ({"decay": GOOD["decay"].double()}, "decay is float64 but q is torch.float32"),
        ({"decay": GOOD["decay"] - 0.5}, r"decay must lie in \(0, 1\]"),
        ({"decay": GOOD["decay"] + 0.5}, r"decay must lie in \(0, 1\]"),
        ({"decay": GOOD["decay"] * float("nan")}, r"decay must lie in \(0, 1\]"),
        ({"state": GOOD["state"].mT}, r"state must be \[B, H, K, V\] = \[2, 3, 5, 7\]; got \[2, 3, 7, 5\]"),
        ({"state": GOOD["state"].half()}, "state must be torch.float32"),
        ({"state": GOOD["state"].to("meta")}, "state must be on the device of q"),
        ({"causal": False}, "state needs causal=True"),
        ({"causal": False, "state": None}, "decay needs causal=True"),
        ({"causal": False, "state": None, "return_state": True}, "return_state needs causal=True"),
        (PACKED | {"causal": False, "cu_seqlens": ENDS}, "cu_seqlens needs causal=True"),
        ({"cu_seqlens": ENDS}, "cu_seqlens needs batch size 1"),
        (PACKED | {"cu_seqlens": ENDS.long()}, r"cu_seqlens must be int32 \[N\+1\]"),
        (PACKED | {"cu_seqlens": ENDS[:1]}, r"cu_seqlens must be int32 \[N\+1\]"),
        (PACKED | {"cu_seqlens": ENDS[:2]}, "cu_seqlens must go from 0 to T = 10; got 0 to 4"),
        (PACKED | {"cu_seqlens": ENDS[1:]}, "cu_seqlens must go from 0 to T = 10; got 4 to 10"),
        (PACKED | {"cu_seqlens": ENDS[[0, 2, 1, 2]]}, "cu_seqlens must never decrease"),
        (PACKED | {"cu_seqlens": ENDS.to("meta")}, "cu_seqlens must be on the inputs' device"),
        (PACKED | {"cu_seqlens": ENDS, "state": GOOD["state"][:1]}, r"state must be \[N, H, K, V\] = \[2, 3, 5, 7\]"),
        ({"impl": "fast"}, "impl must be one of auto, triton, reference; got 'fast'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes, message):
    linear_attention(**GOOD)
    linear_attention(**GOOD | PACKED, cu_seqlens=ENDS)
    with pytest.raises(ValueError, match=message) as refusal:
        linear_attention(**GOOD | changes)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": GOOD["k"]}, r"q, k \[B, H, K\], v \[B, H, V\]"),
        ({"v": GOOD["v"][:1, 0]}, "v their first axes"),
        ({"state": GOOD["state"][:1]}, r"state must be \[B, H, K, V\] = \[2, 3, 5, 7\]; got \[1, 3, 5, 7\]"),
        ({"state": GOOD["state"].double()}, "state must be torch.float32"),
        ({"decay": GOOD["decay"] + 1}, r"decay must lie in \(0, 1\]"),
    ],
)
def test_a_step_refuses_what_does_not_fit(changes, message):
    good = {name: GOOD[name][:, 0] for name in "qkv"} | {"state": GOOD["state"], "decay": GOOD["decay"]}
    linear_attention_step(**good)
    with pytest.raises(ValueError, match=message):
        linear_attention_step(**good | changes)


def test_chunks_are_what_runs(monkeypatch):
    monkeypatch.setattr(reference, "quadratic", None)
    monkeypatch.setattr(reference, "recurrent", None)
    linear_attention(*(GOOD[name] for name in "qkv"), impl="reference")
