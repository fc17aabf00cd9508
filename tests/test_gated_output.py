"""The gated output: its reference against the layer's own lines, and what the public face refuses."""

import functools
from typing import Any

import pytest
import torch
from jaxtyping import jaxtyped
from torch import nn
from torch.nn import functional as F

from chela.ops import dropout as masks
from chela.ops.gated_output import gated_output
from chela.ops.random_inputs import gated_output_inputs
from chela.ops.testing import check_op, relative_error, values_and_gradients

DOUBLE = torch.float64
SEED = torch.tensor(11)


def by_layers(m, mixed, residual, weight, bias=None, gain=None, *, heads=1, rate=0.0):
    """One line of the definition after the other, the mask written out."""
    d, v = weight.shape
    gate, h, p = mixed[..., :v], mixed[..., v : v + d], mixed[..., v + d :]
    if gain is not None:
        norm = nn.RMSNorm(v // heads, eps=1e-6, elementwise_affine=False)
        m = torch.cat([norm(part) for part in m.chunk(heads, -1)], -1) * gain
    pre = h + (gate * torch.sigmoid(gate) * m) @ weight.T
    pre = pre if bias is None else pre + bias
    kept = masks.keep(SEED, m.shape[:-1].numel(), d, rate, stream=2).view(pre.shape)
    a = pre * torch.sigmoid(pre) * kept / (1 - masks.threshold(rate) / 65536)
    open_ = torch.sigmoid(p)
    return open_ * a + (1 - open_) * residual


def assert_same(actual, expected, tolerance=1e-12):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert relative_error(actual[name], value) <= tolerance, name


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("bias", "gain"), [(True, True), (False, True), (True, False)])
def test_values_and_gradients_are_those_of_the_definition(bias, gain, heads, rate):
    inputs = gated_output_inputs(2, 9, d=10, v=12, bias=bias, gain=gain, dtype=DOUBLE)
    op = functools.partial(gated_output, heads=heads, dropout=rate, seed=SEED)
    assert_same(
        values_and_gradients(op, inputs),
        values_and_gradients(functools.partial(by_layers, heads=heads, rate=rate), inputs),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_is_within_the_budget(dtype):
    def plain(m, mixed, residual, weight, bias, gain):
        d, v = weight.shape
        gate, h, p = mixed.split([v, d, d], -1)
        u = F.silu(gate) * F.rms_norm(m, (v,), eps=1e-6) * gain.to(m.dtype)
        a = F.silu(h + F.linear(u, weight.to(m.dtype), bias.to(m.dtype)))
        return residual + torch.sigmoid(p) * (a - residual)

    check_op(gated_output, plain, gated_output_inputs(50, d=24, v=40, dtype=dtype))


def test_autocast_changes_nothing():
    inputs = gated_output_inputs(20, d=24, v=40)
    exact = gated_output(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated_output(**inputs), exact)


def test_the_residual_says_what_comes_out():
    inputs = gated_output_inputs(20, d=24, v=40, dtype=torch.bfloat16, residual_dtype=torch.float32)
    assert gated_output(**inputs).dtype == torch.float32
    assert gated_output(**inputs | {"residual": inputs["residual"].bfloat16()}).dtype == torch.bfloat16


def test_a_gate_that_is_shut_lets_the_residual_through_and_one_that_is_open_does_not():
    inputs = gated_output_inputs(20, d=24, v=40)
    for p, expected in ((-200.0, inputs["residual"]), (200.0, None)):
        inputs["mixed"][:, 64:] = p
        out = gated_output(**inputs)
        assert torch.equal(out, expected) if expected is not None else (out > -0.3).all()  # SiLU's least is -0.279


def test_the_same_seed_drops_the_same_and_another_does_not():
    inputs = gated_output_inputs(20, d=24, v=40)
    op = functools.partial(gated_output, **inputs, dropout=0.2)
    assert torch.equal(op(seed=SEED), op(seed=SEED.clone()))
    assert not torch.equal(op(seed=SEED), op(seed=SEED + 1))
    assert torch.equal(gated_output(**inputs, seed=SEED), gated_output(**inputs))


def test_gradients_are_the_derivatives():
    inputs = gated_output_inputs(3, d=3, v=4, dtype=DOUBLE)
    names, leaves = [*inputs], [tensor.requires_grad_() for tensor in inputs.values()]

    def op(*tensors):
        return gated_output(**dict(zip(names, tensors, strict=True)), heads=2, dropout=0.3, seed=SEED)

    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


def test_no_rows():
    inputs = gated_output_inputs(2, 0, d=10, v=12)
    op = functools.partial(gated_output, dropout=0.1, seed=SEED)
    assert not any(value.any() for value in values_and_gradients(op, inputs).values())


def test_compiles_without_graph_breaks():
    inputs = gated_output_inputs(20, d=24, v=40)
    op = functools.partial(gated_output, dropout=0.2, seed=SEED)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_same(values_and_gradients(compiled, inputs), values_and_gradients(op, inputs), 1e-6)


def test_annotated_shapes_hold():
    beartype = pytest.importorskip("beartype").beartype
    inputs = gated_output_inputs(2, 5, d=10, v=12)
    jaxtyped(gated_output, typechecker=beartype)(**inputs, dropout=0.1, seed=SEED)


GOOD = gated_output_inputs(2, 5, d=10, v=12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"m": torch.tensor(1.0)}, r"m must be \[..., V\]; got a single number"),
        ({"m": GOOD["m"].int()}, "m must be a floating-point tensor; got torch.int32"),
        ({"mixed": GOOD["mixed"].double()}, "mixed must have the dtype of m, torch.float32; got torch.float64"),
        ({"mixed": GOOD["m"]}, r"mixed must be \[..., V \+ 2D\] = \[2, 5, 32\]; got \[2, 5, 12\]"),
        ({"residual": GOOD["residual"][:1]}, r"residual must be \[..., D\] = \[2, 5, 10\]; got \[1, 5, 10\]"),
        ({"residual": GOOD["residual"].to("meta")}, "residual must be on the device of m"),
        ({"residual": GOOD["residual"].double()}, "residual is float64 but m is torch.float32"),
        ({"weight": GOOD["weight"].mT}, r"weight must be \[D, V\] with V = 12, both at least 1; got \[12, 10\]"),
        ({"bias": GOOD["gain"]}, r"bias must be \[D\] = \[10\]; got \[12\]"),
        ({"gain": GOOD["bias"]}, r"gain must be \[V\] = \[12\]; got \[10\]"),
        ({"heads": 5}, "heads must divide V = 12; got 5"),
        ({"heads": 0}, "heads must divide V = 12; got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1; got 1.0"),
        ({"dropout": 0.1}, r"dropout needs a seed, an int64 tensor \[\] on the device of m, cpu; got None"),
        ({"dropout": 0.1, "seed": SEED.int()}, r"got torch.int32 \[\] on cpu"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, reference"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes, message):
    arguments: dict[str, Any] = GOOD | changes
    with pytest.raises(ValueError, match=message) as caught:
        gated_output(**arguments)
    assert "\n" not in str(caught.value)


def test_layouts_change_nothing():
    plain = gated_output(**GOOD)
    spread: dict[str, Any] = {name: torch.cat([x, x], -1)[..., : x.shape[-1]] for name, x in GOOD.items()}
    assert torch.equal(gated_output(**spread), plain)
