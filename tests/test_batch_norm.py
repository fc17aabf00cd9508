"""Batch norm as it trains: its reference against torch's own, and what the public face refuses."""

from typing import Any

import pytest
import torch
from torch import nn

from chela.ops.batch_norm import batch_norm
from chela.ops.random_inputs import batch_norm_inputs
from chela.ops.testing import relative_error, values_and_gradients


def run(**inputs):
    """The rows alone: no gradient flows through the moments."""
    return batch_norm(**inputs)[0]


def test_without_padding_it_is_torch_s():
    inputs = batch_norm_inputs(3, 7, d=5, dtype=torch.float64)
    norm = nn.BatchNorm1d(5, dtype=torch.float64)

    def plain(x, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x.flatten(0, 1),)).view_as(x)

    expected = values_and_gradients(plain, inputs)
    for name, value in values_and_gradients(run, inputs).items():
        assert relative_error(value, expected[name]) < 1e-12, name
    _, (mean, variance, count) = batch_norm(**inputs)
    rows = inputs["x"].flatten(0, 1)
    torch.testing.assert_close(mean, rows.mean(0))
    torch.testing.assert_close(variance, rows.var(0, correction=0))
    assert count == 21


def test_padding_is_normalised_and_does_not_count():
    inputs = batch_norm_inputs(2, 9, d=5, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    y, moments = batch_norm(**inputs, mask=mask)
    real, alone = batch_norm(**{**inputs, "x": inputs["x"][mask]})
    torch.testing.assert_close(y[mask], real)
    torch.testing.assert_close(moments, alone)
    slope = inputs["weight"] / torch.sqrt(moments.variance + 1e-5)
    torch.testing.assert_close(y[~mask], (inputs["x"][~mask] - moments.mean) * slope + inputs["bias"])


def test_no_gradient_flows_through_the_moments():
    moments = batch_norm(**{name: leaf.requires_grad_() for name, leaf in batch_norm_inputs(9, d=5).items()})[1]
    assert not any(value.requires_grad for value in moments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, r"x must be \[\.\.\., D\]; got a single number"),
        ({"weight": torch.ones(6)}, r"weight must be \[D\] = \[5\]; got \[6\]"),
        ({"bias": torch.ones(5, 1)}, r"bias must be \[D\] = \[5\]; got \[5, 1\]"),
        (
            {"mask": torch.ones(8, dtype=torch.bool)},
            r"mask must be bool \[\.\.\.\] = \[9\] .*; got torch.bool \[8\] on cpu",
        ),
        ({"mask": torch.ones(9)}, r"mask must be bool .*; got torch.float32 \[9\] on cpu"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, reference; got 'cuda'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments: Any = {**batch_norm_inputs(9, d=5), **change}
    with pytest.raises(ValueError, match=message):
        batch_norm(**arguments)
