"""Shared attention: its reference against linear attention, and what the public face refuses."""

import functools

import pytest
import torch
from jaxtyping import jaxtyped
from torch.nn import functional as F

from chela.ops import linear_attention
from chela.ops.random_inputs import shared_attention_inputs
from chela.ops.shared_attention import shared_attention
from chela.ops.testing import check_op, relative_error, values_and_gradients

DOUBLE = torch.float64


def some(batch, length, device="cpu"):
    """Mask: the last tokens of each row but the first are padding, at least one is real."""
    lengths = (length - 5 * torch.arange(batch, device=device)).clamp(min=1)
    return torch.arange(length, device=device) < lengths[:, None]


def rounding(shared, values, q_gain, q_bias, k_gain, k_bias, *, mask=None, scale=1.0, attend=None):
    """One line of the definition after the other, each in the dtype of its inputs."""
    dtype, heads = shared.dtype, len(q_gain)
    basis = F.silu(shared).unsqueeze(2)
    q, k = (basis * gain.to(dtype) + bias.to(dtype) for gain, bias in ((q_gain, q_bias), (k_gain, k_bias)))
    v = F.silu(values).unflatten(2, (heads, -1))
    if mask is not None:
        k = k.masked_fill(~mask[:, :, None, None], 0)
    if attend is None:
        total = torch.einsum("bshk,bshv->bhkv", k, v)
        out = scale * torch.einsum("bthk,bhkv->bthv", q, total)
    else:
        out = attend(q, k, v)
    return out.flatten(2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_values_and_gradients_are_those_of_linear_attention(heads, masked):
    inputs = shared_attention_inputs(2, 9, heads, 5, 12, dtype=DOUBLE)
    mask = some(2, 9) if masked else None
    attend = functools.partial(linear_attention, causal=False, scale=0.3)
    actual = values_and_gradients(functools.partial(shared_attention, mask=mask, scale=0.3), inputs)
    plain = functools.partial(rounding, mask=mask, attend=lambda q, k, v: attend(q, k, v)[0])
    for name, value in values_and_gradients(plain, inputs).items():
        assert actual[name].shape == value.shape, name
        assert relative_error(actual[name], value) <= 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_is_within_the_budget(dtype):
    check_op(shared_attention, rounding, shared_attention_inputs(2, 50, 2, 24, 40, dtype=dtype))


def test_autocast_changes_nothing():
    inputs = shared_attention_inputs(2, 20, 2, 24, 40)
    exact = shared_attention(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(shared_attention(**inputs), exact)


def test_annotated_shapes_hold():
    beartype = pytest.importorskip("beartype").beartype
    inputs = shared_attention_inputs(2, 7, 3, 5, 12)
    out = jaxtyped(shared_attention, typechecker=beartype)(**inputs, mask=some(2, 7))
    assert out.shape == (2, 7, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.ones(2, 8, 12)}, r"shared must be \[B, T, K\] and values \[B, T, V\] of the same tokens"),
        ({"values": torch.ones(2, 9, 13)}, r"q_gain must be \[H, K\], H a divisor of V = 13; got \[3, 5\]"),
        ({"k_bias": torch.ones(3, 4)}, r"k_bias must be \[H, K\] = \[3, 5\]; got \[3, 4\]"),
        ({"mask": torch.ones(2, 9)}, r"mask must be bool \[B, T\] = \[2, 9\] on the device of shared"),
        ({"q_gain": torch.ones(3, 5, dtype=DOUBLE)}, "q_gain is float64 but shared is torch.float32: cast q_gain"),
        ({"values": torch.ones(2, 9, 12).half()}, "values must have the dtype of shared"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, reference"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message):
        shared_attention(**shared_attention_inputs(2, 9, 3, 5, 12) | change)
