import pytest
import torch

from chela.layers.long_kernel import MultiscaleKernel
from chela.ops.long_conv import reference
from chela.ops.long_conv.multiscale import moving_sum, multiscale
from chela.ops.testing import draw, values_and_gradients

DOUBLE = torch.float64


@pytest.mark.parametrize("per_octave", [1, 4, 16])
@pytest.mark.parametrize("carried", [0, 30])
@pytest.mark.parametrize("length", [1, 5, 70, 200])
@pytest.mark.parametrize("lags", [1, 3, 16, 17, 40, 64, 100, 1000])
def test_values_and_gradients_are_those_of_the_dense_kernel(lags, length, carried, per_octave):
    kernel = MultiscaleKernel(3, lags, per_octave).double()

    def dense(history, taps):
        runs = [(taps[:, j, :, None]).expand(-1, -1, n).flatten(1) for j, n in enumerate(kernel.held)]
        whole = torch.cat(runs, dim=1)[:, :lags]
        assert torch.equal(whole, kernel()) or taps is not scaled
        return reference.direct(history, whole[:, : history.shape[1]], whole[:, :0], length)

    scaled = (kernel.taps * kernel.amplitude.unsqueeze(-1)).detach()
    inputs = {"history": draw(2, carried + length, 3, seed=0, dtype=DOUBLE), "taps": scaled}
    dense(**inputs)
    actual = values_and_gradients(lambda history, taps: multiscale(history, taps, lags, length), inputs)
    for name, value in values_and_gradients(dense, inputs).items():
        torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 21])
def test_moving_sums(width):
    x = draw(2, 15, 3, seed=0, dtype=DOUBLE)
    expected = torch.stack([x[:, max(0, t - width + 1) : t + 1].sum(1) for t in range(15)], 1)
    torch.testing.assert_close(moving_sum(x, width), expected)


def test_the_past_stays_bit_equal_when_the_future_changes():
    x, taps = draw(1, 100, 3, seed=0), draw(3, 5, 4, seed=1)
    changed = x.clone()
    changed[:, 60:] *= 1e10
    before, after = (multiscale(y, taps, 64, 100)[:, :60] for y in (x, changed))
    assert torch.equal(before, after)
