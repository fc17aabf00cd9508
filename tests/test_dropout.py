"""Dropout by counter: the generator's published answers, and the mask's statistics."""

import math

import pytest
import torch

from chela.ops import dropout as op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_its_authors_known_answers(counter, key, words):
    low, high = (int(word, 16) for word in key.split())
    key = low | high << 32
    key = torch.tensor(key - (1 << 64) if key >> 63 else key)
    c0, c1, c2, c3 = (torch.tensor(int(word, 16)) for word in counter.split())
    assert [int(word) for word in op.philox((c0, c1, c2, c3), key)] == [int(word, 16) for word in words.split()]


def seed_of(number):
    return torch.tensor(number, device=DEVICE)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_entries_are_dropped_at_the_rate_and_independently(rate):
    kept = op.keep(seed_of(3), 1000, 256, rate).double()
    band = 5 * math.sqrt(rate * (1 - rate))  # five standard deviations of a mean of n entries, times the root of n
    assert abs(kept.mean() - (1 - rate)) < band / math.sqrt(kept.numel())
    assert (kept.mean(0) - (1 - rate)).abs().max() < band / math.sqrt(1000)
    centred = (kept - kept.mean()) / kept.std()
    other = op.keep(seed_of(3), 1000, 256, rate, stream=1).double()
    shifts = [centred.roll(n, 1) for n in (1, 8, 64)] + [centred.roll(n, 0) for n in (1, 8)]
    for shifted in (*shifts, (other - other.mean()) / other.std()):
        assert abs((centred * shifted).mean()) < 5 / math.sqrt(kept.numel())


def test_a_mask_is_a_function_of_seed_stream_and_place_alone():
    whole = op.keep(seed_of(-7), 50, 256, 0.3)
    for rows, columns in ((1, 1), (7, 63), (50, 65), (33, 160)):
        assert torch.equal(op.keep(seed_of(-7), rows, columns, 0.3), whole[:rows, :columns])
    assert not torch.equal(op.keep(seed_of(-6), 50, 256, 0.3), whole)
    assert not torch.equal(op.keep(seed_of(-7 + (1 << 32)), 50, 256, 0.3), whole)
    assert not torch.equal(op.keep(seed_of(-7), 50, 256, 0.3, stream=1), whole)


def test_what_is_kept_is_scaled_so_that_the_expectation_stays():
    x = torch.ones(2, 3000, 100, device=DEVICE, dtype=torch.float64)
    out = op.dropout(x, seed_of(1), 0.1)
    assert out.unique().tolist() == [0, op.scale(0.1)]
    assert abs(out.mean() - 1) < 5 * math.sqrt(0.1 / 0.9 / x.numel())
    assert op.scale(0.1) * (1 - op.threshold(0.1) / op.HALF) == pytest.approx(1, abs=1e-15)
    assert op.dropout(x, seed_of(1), 0.0) is x


def test_dropped_entries_get_no_gradient():
    x = torch.randn(20, 70, device=DEVICE, requires_grad=True)
    (dx,) = torch.autograd.grad(op.dropout(x, seed_of(1), 0.4).sum(), x)
    assert torch.equal(dx, torch.where(op.keep(seed_of(1), 20, 70, 0.4), op.scale(0.4), 0.0))


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_a_rate_outside_of_its_range_is_refused(rate):
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1; got"):
        op.dropout(torch.ones(2, 2), torch.tensor(0), rate)


def test_compiles_without_graph_breaks():
    x, seed = torch.randn(20, 70, device=DEVICE), seed_of(5)
    compiled = torch.compile(op.dropout, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, seed, 0.2), op.dropout(x, seed, 0.2))
