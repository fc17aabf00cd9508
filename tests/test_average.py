"""Averaged weights: their formula, where they stand in for the trained ones, and that a stop changes nothing."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from chela.models import build
from chela.training.average import Average
from chela.training.checkpoint import steps
from test_checkpoint import assert_same_run, stop_after  # pyrefly: ignore
from training_kit import make_run, run_tiny  # pyrefly: ignore

NORMED = {"norm": "batch", "token_dropout": 0.2}


def test_the_average_follows_by_its_formula():
    linear = nn.Linear(3, 4, dtype=torch.float64)
    model = nn.Sequential(linear, nn.BatchNorm1d(4, dtype=torch.float64))
    average = Average(model, 0.5)
    expected = {name: x.clone() for name, x in model.state_dict().items() if x.is_floating_point()}
    for step in range(20):
        model(torch.randn(8, 3, dtype=torch.float64))
        with torch.no_grad():
            linear.weight += torch.randn(4, 3)
        average.follow(step if step % 2 else torch.tensor(float(step)))
        kept = min(0.5, (1 + step) / (10 + step))
        for name in expected:
            expected[name] = kept * expected[name] + (1 - kept) * model.state_dict()[name]
    assert min(0.5, 20 / 29) == 0.5 > 8 / 17, "both sides of the minimum were met"
    assert (
        average.tensors.keys()
        == expected.keys()
        == {"0.weight", "0.bias", "1.weight", "1.bias"}
        | {
            "1.running_mean",
            "1.running_var",
        }
    )
    for name, value in expected.items():
        torch.testing.assert_close(average.tensors[name], value, rtol=1e-12, atol=1e-12)


def test_the_model_has_the_average_for_a_while_and_then_its_weights_again(tmp_path):
    model = build(make_run(tmp_path, model=NORMED).model)
    average = Average(model, 0.9)
    with torch.no_grad():
        for x in model.parameters():
            x += 1
    before, places = {n: x.clone() for n, x in model.state_dict().items()}, [x.data_ptr() for x in model.parameters()]

    def look_and_fail() -> None:
        with average.in_the_model():
            assert all(torch.equal(model.state_dict()[name], x) for name, x in average.tensors.items())
            raise KeyError

    with pytest.raises(KeyError):
        look_and_fail()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert [x.data_ptr() for x in model.parameters()] == places


def test_a_run_keeps_the_average_and_trains_as_without_it(tmp_path):
    plain, averaged = (make_run(tmp_path / str(d), model=NORMED, ema_decay=d, eval_every=12) for d in (0.0, 0.9))
    results = [run_tiny(run)[0] for run in (plain, averaged)]
    trained, after = (
        load_file(steps(run.folder / "checkpoint")[-1] / "model.safetensors") for run in (plain, averaged)
    )
    assert all(torch.equal(trained[name], after[name]) for name in trained)
    best = load_file(averaged.folder / "model.safetensors")
    kept = load_file(steps(averaged.folder / "checkpoint")[-1] / "average.safetensors")
    assert kept.keys() == {name for name, x in best.items() if x.is_floating_point()}
    assert all(torch.equal(best[name], kept[name]) for name in kept)
    assert not torch.equal(kept["head.weight"], trained["head.weight"])
    assert results[0].validation != results[1].validation
    assert results[0].test != results[1].test


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_stopped_run_with_an_average_ends_bit_equal(tmp_path, device):
    whole, pieces = (
        make_run(tmp_path / name, model=NORMED, ema_decay=0.9, device=device, pad_multiple=4)
        for name in ("whole", "pieces")
    )
    run_tiny(whole)
    for done in (5, 2):
        with stop_after(done):
            run_tiny(pieces)
    run_tiny(pieces)
    assert_same_run(whole.folder, pieces.folder)
    one, two = (steps(run.folder / "checkpoint")[-1] / "average.safetensors" for run in (whole, pieces))
    assert one.read_bytes() == two.read_bytes()
