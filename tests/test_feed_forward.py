"""The feed-forward part: its reference against torch's own layers, and what the public face refuses."""

import functools
from typing import Any

import pytest
import torch
from jaxtyping import jaxtyped
from torch.nn import functional as F

from chela.layers.norms import make_norm
from chela.ops import dropout as masks
from chela.ops.feed_forward import feed_forward, fits
from chela.ops.random_inputs import feed_forward_inputs
from chela.ops.testing import check_op, relative_error, values_and_gradients

DOUBLE = torch.float64
NORMS: list[Any] = ["layer", "rms", "scale", "batch", "none"]
SEED = torch.tensor(11)


def by_layers(
    x,
    w1,
    b1,
    w2,
    b2,
    w3=None,
    gain=None,
    shift=None,
    mean=None,
    rstd=None,
    residual=None,
    *,
    norm,
    rate=0.0,
    bounded=False,
):
    """With the norms that blocks use, the masks written out."""
    h = x
    if norm == "batch":
        assert gain is not None
        h = gain * rstd * x + (shift - gain * rstd * mean)
    elif norm != "none":
        layer = make_norm(norm, x.shape[-1])
        names = {"layer": ("weight", "bias"), "rms": ("weight",), "scale": ("gain",)}[norm]
        given = {name: p for name, p in zip(names, (gain, shift), strict=False) if p is not None}
        h = torch.func.functional_call(layer, given, (x.reshape(1, -1, x.shape[-1]),)).view(x.shape)
    n = h
    h = n @ w1.T + b1
    h = h * torch.sigmoid(h)
    if w3 is not None:
        h = h * ((n @ w3.T).tanh() if bounded else n @ w3.T)
    rows = x.shape[:-1].numel()
    kept = [masks.keep(SEED, rows, width, rate, stream=n) for n, width in enumerate((w1.shape[0], w1.shape[1]))]
    h = h * kept[0].view(h.shape) / (1 - masks.threshold(rate) / 65536)
    y = h @ w2.T + b2
    y = y * kept[1].view(y.shape) / (1 - masks.threshold(rate) / 65536)
    return y + (x if residual is None else residual)


def assert_same(actual, expected, tolerance=1e-12):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert relative_error(actual[name], value) <= tolerance, name


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize(("gated", "bounded"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_values_and_gradients_are_those_of_the_layers(norm, residual, gated, bounded, rate):
    inputs = feed_forward_inputs(2, 9, d=10, f=70, norm=norm, residual=residual, gated=gated, dtype=DOUBLE)
    op = functools.partial(feed_forward, norm=norm, bounded=bounded, dropout=rate, seed=SEED)
    plain = functools.partial(by_layers, norm=norm, rate=rate, bounded=bounded)
    assert_same(values_and_gradients(op, inputs), values_and_gradients(plain, inputs))


def test_biases_may_be_left_out():
    inputs = feed_forward_inputs(2, 9, d=10, f=70, gated=True, dtype=DOUBLE)
    zeros: dict[str, Any] = {name: torch.zeros_like(inputs[name]) for name in ("b1", "b2")}
    op = functools.partial(feed_forward, norm="layer")
    assert torch.equal(op(**inputs | {"b1": None, "b2": None}), op(**inputs | zeros))
    assert not torch.equal(op(**inputs), op(**inputs | zeros))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_is_within_the_budget(dtype):
    inputs = feed_forward_inputs(50, d=24, f=80, dtype=dtype)

    def plain(x, w1, b1, w2, b2, gain, shift):
        w1, b1, w2, b2, gain, shift = (p.to(x.dtype) for p in (w1, b1, w2, b2, gain, shift))
        h = F.silu(F.linear(F.layer_norm(x, x.shape[-1:], gain, shift), w1, b1))
        return x + F.linear(h, w2, b2)

    check_op(functools.partial(feed_forward, norm="layer"), plain, inputs)


def test_autocast_says_what_the_products_take_and_the_residual_what_comes_out():
    inputs = feed_forward_inputs(20, d=24, f=80)
    low = feed_forward_inputs(20, d=24, f=80, dtype=torch.bfloat16)
    exact = feed_forward(**inputs, norm="layer")
    with torch.autocast("cpu", torch.bfloat16):
        out = feed_forward(**inputs, norm="layer")
        assert feed_forward(**low, norm="layer").dtype == torch.bfloat16
        assert feed_forward(**low, norm="layer", residual=inputs["x"]).dtype == torch.float32
    assert out.dtype == torch.float32
    assert 1e-5 < relative_error(out, exact) < 1e-2
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert torch.equal(feed_forward(**inputs, norm="layer"), exact)


def test_what_fits_is_a_matter_of_what_the_products_take():
    x = torch.empty(0, 160)
    assert not fits(x)
    assert fits(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert fits(x)
        assert not fits(torch.empty(0, 257))


def test_the_same_seed_drops_the_same_and_another_does_not():
    inputs = feed_forward_inputs(20, d=24, f=80)
    op = functools.partial(feed_forward, **inputs, norm="layer", dropout=0.2)
    assert torch.equal(op(seed=SEED), op(seed=SEED.clone()))
    assert not torch.equal(op(seed=SEED), op(seed=SEED + 1))
    assert torch.equal(feed_forward(**inputs, norm="layer", seed=SEED), feed_forward(**inputs, norm="layer"))


def test_gradients_are_the_derivatives():
    inputs = feed_forward_inputs(3, d=3, f=5, gated=True, residual=True, dtype=DOUBLE)
    names, leaves = [*inputs], [tensor.requires_grad_() for tensor in inputs.values()]

    def op(*tensors):
        return feed_forward(**dict(zip(names, tensors, strict=True)), norm="layer", dropout=0.3, seed=SEED)

    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


def test_no_rows():
    for norm in NORMS:
        inputs = feed_forward_inputs(2, 0, d=10, f=12, norm=norm)
        op = functools.partial(feed_forward, norm=norm, dropout=0.1, seed=SEED)
        assert not any(value.any() for value in values_and_gradients(op, inputs).values())


def test_compiles_without_graph_breaks():
    inputs = feed_forward_inputs(20, d=24, f=80)
    op = functools.partial(feed_forward, norm="layer", dropout=0.2, seed=SEED)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_same(values_and_gradients(compiled, inputs), values_and_gradients(op, inputs), 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(**inputs), op(**inputs))


def test_annotated_shapes_hold():
    beartype = pytest.importorskip("beartype").beartype
    for norm in NORMS:
        inputs = feed_forward_inputs(2, 5, d=10, f=12, norm=norm, gated=norm == "rms", residual=True)
        jaxtyped(feed_forward, typechecker=beartype)(**inputs, norm=norm, dropout=0.1, seed=SEED)


GOOD = feed_forward_inputs(2, 5, d=10, f=12, residual=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": GOOD["x"].int()}, "x must be a floating-point tensor; got torch.int32"),
        ({"x": torch.tensor(1.0)}, r"x must be \[..., D\]; got a single number"),
        ({"w1": GOOD["w1"].mT}, r"w1 must be \[F, D\] with D = 10, both at least 1; got \[10, 12\]"),
        ({"b1": GOOD["b1"][:3]}, r"b1 must be \[F\] = \[12\]; got \[3\]"),
        ({"w2": GOOD["w1"]}, r"w2 must be \[D, F\] = \[10, 12\]; got \[12, 10\]"),
        ({"w3": GOOD["w2"]}, r"w3 must be \[F, D\] = \[12, 10\]; got \[10, 12\]"),
        ({"b2": GOOD["b1"]}, r"b2 must be \[D\] = \[10\]; got \[12\]"),
        ({"w2": GOOD["w2"].double()}, "w2 is float64 but x is torch.float32: cast w2 to float32"),
        ({"norm": "group"}, "norm must be one of layer, rms, scale, batch, none; got 'group'"),
        ({"norm": "batch"}, "norm 'batch' needs mean"),
        ({"mean": GOOD["shift"]}, "norm 'layer' takes no mean"),
        ({"norm": "batch", "mean": GOOD["shift"], "rstd": GOOD["b1"]}, r"rstd must be \[D\] = \[10\]; got \[12\]"),
        ({"gain": None}, "norm 'layer' needs gain"),
        ({"norm": "rms"}, "norm 'rms' takes no shift"),
        ({"norm": "none", "shift": None}, "norm 'none' takes no gain"),
        ({"norm": "scale", "shift": None}, r"gain must be \[1\] = \[1\]; got \[10\]"),
        ({"residual": GOOD["x"][:1]}, r"residual must be \[..., D\] = \[2, 5, 10\]; got \[1, 5, 10\]"),
        ({"residual": GOOD["x"].to("meta")}, "residual must be on the device of x"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1; got 1.0"),
        ({"dropout": 0.1}, r"dropout needs a seed, an int64 tensor \[\] on the device of x, cpu; got None"),
        ({"dropout": 0.1, "seed": SEED.int()}, r"got torch.int32 \[\] on cpu"),
        ({"bounded": True}, "bounded is about the product with w3: give w3, or leave bounded out"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, reference"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes, message):
    feed_forward(**GOOD, norm="layer")
    arguments: dict[str, Any] = {**GOOD, "norm": "layer", **changes}
    with pytest.raises(ValueError, match=message) as refusal:
        feed_forward(**arguments)
    assert "\n" not in str(refusal.value)
