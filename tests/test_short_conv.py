import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import jaxtyped
from torch.nn import functional as F

from chela.ops import short_conv, short_conv_step
from chela.ops.random_inputs import draw, short_conv_inputs
from chela.ops.short_conv import reference
from chela.ops.testing import check_op, relative_error, values_and_gradients

DOUBLE = torch.float64
WIDTHS = [1, 2, 3, 4, 31]
convolve: Any = functools.partial(short_conv, return_state=True, impl="reference")


def assert_same(actual, expected, tolerance=1e-10):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert relative_error(actual[name], value) <= tolerance, name


def by_definition(x, weight, bias=None, state=None, *, causal=True, activation=None):
    """Causal or centred, the sum over taps, and the last W-1 inputs."""
    width, length = weight.shape[1], x.shape[1]
    left = width - 1 if causal else (width - 1) // 2
    before = x.new_zeros(x.shape[0], left, x.shape[2]) if state is None else state
    padded = torch.cat([before, x, x.new_zeros(x.shape[0], width - 1 - left, x.shape[2])], dim=1)
    out = reference.taps(padded, weight, bias)
    out = out * torch.sigmoid(out) if activation else out
    return out, padded[:, length:] if causal else None


def in_pieces(cuts, x, weight, bias=None, state=None, **options):
    outs = []
    for start, stop in itertools.pairwise([0, *sorted(cuts), x.shape[1]]):
        out, state = convolve(x[:, start:stop], weight, bias, state=state, **options)
        outs.append(out)
    return torch.cat(outs, dim=1), state


def in_steps(x, weight, bias, state, **options):
    outs = []
    for token in x.unbind(dim=1):
        out, state = short_conv_step(token, weight, bias, state=state, impl="reference", **options)
        outs.append(out)
    return torch.stack(outs, dim=1), state


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_taps_are_the_sum_of_the_docstring(width, causal):
    x, weight, bias = short_conv_inputs(2, 9, 3, width, dtype=DOUBLE).values()
    out, _ = short_conv(x, weight, bias, causal=causal)
    left = width - 1 if causal else (width - 1) // 2
    for t in range(9):
        taps = [weight[:, j] * x[:, t + j - left] for j in range(width) if 0 <= t + j - left < 9]
        torch.testing.assert_close(out[:, t], bias + sum(taps))


@pytest.mark.parametrize("width", WIDTHS)
def test_centred_form_is_what_torch_calls_same(width):
    x, weight, bias = short_conv_inputs(2, 50, 3, width, dtype=DOUBLE).values()
    out, _ = short_conv(x, weight, bias, causal=False)
    padding = ((width - 1) // 2, width // 2)  # by hand: torch warns where padding="same" pads unevenly
    same = F.conv1d(F.pad(x.mT, padding), weight.unsqueeze(1), bias, groups=3).mT
    torch.testing.assert_close(out, same)


@pytest.mark.parametrize(
    "options", [{}, {"activation": "silu"}, {"causal": False}, {"causal": False, "activation": "silu"}]
)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 127])
def test_both_forms_agree_in_values_and_all_gradients(length, width, options):
    causal = options.get("causal", True)
    inputs = short_conv_inputs(2, length, 5, width, state=causal, dtype=DOUBLE)
    expected = values_and_gradients(functools.partial(by_definition, **options), inputs)
    assert expected.keys() == {"out", *(["state"] if causal else []), *(f"grad {name}" for name in inputs)}
    op = functools.partial(short_conv, return_state=causal, impl="reference", **options)
    assert_same(values_and_gradients(op, inputs), expected)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
@pytest.mark.parametrize("bias", [False, True])
def test_public_op_takes_any_layout_and_no_bias(layout, bias):
    inputs = short_conv_inputs(2, 65, 5, 4, bias=bias, state=True, dtype=DOUBLE, layout=layout)
    assert_same(values_and_gradients(convolve, inputs), values_and_gradients(by_definition, inputs))


def test_no_state_is_a_state_of_zeros():
    inputs = short_conv_inputs(2, 10, 5, 4)
    out, state = convolve(**inputs)
    other, other_state = convolve(**inputs, state=torch.zeros(2, 3, 5))
    assert torch.equal(out, other)
    assert torch.equal(state, other_state)


@given(
    data=st.data(),
    length=st.integers(1, 70),
    width=st.sampled_from(WIDTHS),
    silu=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_split_and_single_steps_equal_the_whole(data, length, width, silu, seed):
    inputs = short_conv_inputs(2, length, 3, width, state=True, dtype=DOUBLE, seed=seed)
    options = {"activation": "silu" if silu else None}
    cuts = data.draw(st.lists(st.integers(0, length), max_size=6))  # pieces may be shorter than W-1, or empty
    whole = values_and_gradients(functools.partial(convolve, **options), inputs)
    assert_same(values_and_gradients(functools.partial(in_pieces, cuts, **options), inputs), whole)
    assert_same(values_and_gradients(functools.partial(in_steps, **options), inputs), whole)


def test_the_state_after_fewer_tokens_than_taps_holds_the_older_ones():
    x, weight = short_conv_inputs(1, 2, 3, 5, bias=False).values()
    before = draw(1, 4, 3, seed=7)
    _, after = convolve(x, weight, state=before)
    assert torch.equal(after, torch.cat([before[:, 2:], x], dim=1))
    _, fresh = convolve(x, weight)
    assert torch.equal(fresh, torch.cat([torch.zeros(1, 2, 3), x], dim=1))


def test_states_share_no_memory_with_inputs():
    x, weight, state = short_conv_inputs(2, 10, 5, 4, bias=False, state=True).values()
    kept = state.clone()
    _, after = convolve(x, weight, state=state)
    _, stepped = short_conv_step(x[:, 0], weight, state=state)
    assert torch.equal(state, kept)
    storages = {tensor.untyped_storage().data_ptr() for tensor in (x, state)}
    assert after.untyped_storage().data_ptr() not in storages
    assert stepped.untyped_storage().data_ptr() not in storages
    assert after.untyped_storage().nbytes() == after.nbytes  # nor does it keep the whole input alive


@pytest.mark.parametrize("width", [4, 31])
def test_the_past_stays_bit_equal_when_the_future_changes(width):
    inputs = short_conv_inputs(2, 150, 5, width)
    out, _ = short_conv(**inputs, activation="silu")
    for t in (0, 1, 63, 64, 148):
        x = inputs["x"].clone()
        x[:, t + 1 :] = float("nan")
        other, _ = short_conv(**inputs | {"x": x}, activation="silu")
        assert torch.equal(out[:, : t + 1], other[:, : t + 1])


BOUNDS = torch.tensor([0, 0, 2, 70, 71, 71, 150, 150], dtype=torch.int32)  # empty, and shorter than W-1


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("given_state", [False, True])
def test_packed_documents_get_the_bits_they_get_alone(given_state, width):
    inputs = short_conv_inputs(1, 150, 5, width)
    if given_state:
        inputs["state"] = draw(7, width - 1, 5, seed=5)
    op = functools.partial(convolve, activation="silu")
    packed = values_and_gradients(functools.partial(op, cu_seqlens=BOUNDS), inputs)
    assert packed["state"].shape == (7, width - 1, 5)
    for n, (start, stop) in enumerate(itertools.pairwise(BOUNDS.tolist())):
        before = inputs["state"][n : n + 1] if given_state else None
        out, after = op(inputs["x"][:, start:stop], inputs["weight"], inputs["bias"], state=before)
        assert torch.equal(packed["out"][:, start:stop], out)
        assert torch.equal(packed["state"][n : n + 1], after)


@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_a_document_never_reaches_its_neighbours(poison):
    inputs = short_conv_inputs(1, 150, 5, 4, bias=False)
    op = functools.partial(convolve, cu_seqlens=torch.tensor([0, 70, 150], dtype=torch.int32))
    clean = values_and_gradients(op, inputs)
    inputs["x"][:, 40:70] = poison
    dirty = values_and_gradients(op, inputs)
    for name in ("out", "grad x"):
        assert torch.equal(clean[name][:, 70:], dirty[name][:, 70:]), name
    assert torch.equal(clean["state"][1], dirty["state"][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [65, 65_536 + 131])
def test_precision_is_within_the_budget_also_past_65536_tokens(length, dtype):
    inputs = short_conv_inputs(1, length, 2, 4, state=True, dtype=dtype)

    def plain(x, weight, bias, state):
        padded = torch.cat([state, x], dim=1)
        out = F.conv1d(padded.mT, weight.to(x.dtype).unsqueeze(1), bias.to(x.dtype), groups=2).mT
        return F.silu(out), padded[:, length:]

    errors = check_op(functools.partial(convolve, activation="silu"), plain, inputs)
    assert errors["out"] <= torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1, 4, 31])
def test_reference_on_a_gpu_is_within_the_budget_and_deterministic(width, nan_memory):
    inputs = short_conv_inputs(2, 5000, 40, width, state=True, device="cuda")
    check_op(
        functools.partial(convolve, activation="silu"), functools.partial(by_definition, activation="silu"), inputs
    )


def test_autocast_does_not_narrow_the_sums():
    inputs = short_conv_inputs(2, 100, 5, 4)
    out, _ = short_conv(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(short_conv(**inputs)[0], out)


def test_no_tokens():
    x, weight, bias, state = short_conv_inputs(2, 0, 5, 4, state=True).values()
    for activation in (None, "silu"):
        out, after = convolve(x, weight, bias, state=state, activation=activation)
        assert out.shape == (2, 0, 5)
        assert torch.equal(after, state)


def test_gradients_are_the_derivatives():
    inputs = short_conv_inputs(1, 4, 2, 3, state=True, dtype=DOUBLE)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def op(x, weight, bias, state):
        return convolve(x, weight, bias, state=state, activation="silu")

    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


@pytest.mark.parametrize("causal", [True, False])
def test_compiles_without_graph_breaks(causal):
    inputs = short_conv_inputs(2, 100, 5, 4, state=causal)
    op = functools.partial(short_conv, causal=causal, return_state=causal, activation="silu")
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_same(values_and_gradients(compiled, inputs), values_and_gradients(op, inputs), 1e-6)


def test_step_compiles_without_graph_breaks():
    inputs = short_conv_inputs(2, 1, 5, 4, state=True)
    inputs["x"] = inputs["x"][:, 0]
    compiled = torch.compile(short_conv_step, fullgraph=True, backend="aot_eager")
    assert_same(values_and_gradients(compiled, inputs), values_and_gradients(short_conv_step, inputs), 1e-6)


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, x, weight, bias):
            return short_conv(x, weight, bias, activation="silu")[0]

    inputs = tuple(short_conv_inputs(2, 100, 5, 4).values())
    program = torch.export.export(Module(), inputs)
    assert torch.equal(program.module()(*inputs), Module()(*inputs))


def test_annotated_shapes_hold():
    beartype = pytest.importorskip("beartype").beartype
    x, weight, bias, state = short_conv_inputs(2, 20, 5, 4, state=True).values()
    jaxtyped(short_conv, typechecker=beartype)(x, weight, bias, state=state, return_state=True)
    jaxtyped(short_conv_step, typechecker=beartype)(x[:, 0], weight, bias, state=state)


GOOD = short_conv_inputs(2, 10, 5, 4, state=True)
ENDS = torch.tensor([0, 4, 10], dtype=torch.int32)
PACKED: dict[str, Any] = {"x": GOOD["x"][:1], "state": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": GOOD["x"][0]}, r"x must be \[B, T, D\]; got \[10, 5\]"),
        ({"x": GOOD["x"].int()}, "x must be a floating-point tensor; got torch.int32"),
        ({"weight": GOOD["weight"].mT}, r"weight must be \[D, W\] with D = 5, W >= 1; got \[4, 5\]"),
        ({"weight": GOOD["weight"][:, :0]}, "W >= 1"),
        ({"weight": GOOD["weight"].double()}, "weight is float64 but x is torch.float32: cast weight to float32"),
        ({"bias": GOOD["bias"][:3]}, r"bias must be \[D\] = \[5\]; got \[3\]"),
        ({"bias": GOOD["bias"].to("meta")}, "bias must be on the device of x"),
        ({"activation": "relu"}, "activation must be None or 'silu'; got 'relu'"),
        ({"state": GOOD["state"][:, :2]}, r"state must be \[B, W-1, D\] = \[2, 3, 5\]; got \[2, 2, 5\]"),
        ({"state": GOOD["state"].half()}, "state must have the dtype of x"),
        ({"causal": False}, "state needs causal=True"),
        ({"causal": False, "state": None, "return_state": True}, "return_state needs causal=True"),
        ({"cu_seqlens": ENDS}, "cu_seqlens needs batch size 1"),
        (PACKED | {"cu_seqlens": ENDS, "state": GOOD["state"][:1]}, r"state must be \[N, W-1, D\] = \[2, 3, 5\]"),
        (PACKED | {"cu_seqlens": ENDS[1:]}, "cu_seqlens must go from 0 to T = 10"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes, message):
    short_conv(**GOOD)
    short_conv(**GOOD | PACKED, cu_seqlens=ENDS)
    with pytest.raises(ValueError, match=message) as refusal:
        short_conv(**GOOD | changes)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": GOOD["x"]}, r"x must be \[B, D\]; got \[2, 10, 5\]"),
        ({"state": GOOD["state"][:1]}, r"state must be \[B, W-1, D\] = \[2, 3, 5\]; got \[1, 3, 5\]"),
        ({"activation": "gelu"}, "activation must be None or 'silu'"),
    ],
)
def test_a_step_refuses_what_does_not_fit(changes, message):
    good = GOOD | {"x": GOOD["x"][:, 0]}
    short_conv_step(**good)
    with pytest.raises(ValueError, match=message):
        short_conv_step(**good | changes)
