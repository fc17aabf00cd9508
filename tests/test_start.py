"""A run that starts from another run's weights."""

import shutil
from dataclasses import replace

import pytest
import torch

from chela.models.files import read_weights
from training_kit import make_run, make_task, run_tiny  # pyrefly: ignore

STILL = {"lr": 1e-12, "kernel_lr": 1e-12, "weight_decay": 0.0, "warmup": 0}


def weights(folder):
    return read_weights(folder / "model.safetensors")[1]


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_the_weights_are_those_of_the_best_validation(tmp_path, norm):
    first = make_run(tmp_path / "first", model={"norm": norm})
    run_tiny(first)
    begun = make_run(
        tmp_path / "second",
        model={"norm": norm, "dropout": 0.0},
        optim=STILL,
        steps=1,
        eval_every=1,
        start_from=str(first.out),
    )
    _, printed = run_tiny(begun)
    assert f"starting from the weights of {first.out}" in printed
    found, wanted = weights(begun.out), weights(first.out)
    assert found.keys() == wanted.keys()
    learned = [name for name in wanted if "running" not in name and "num_batches" not in name]
    for name in learned:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-9, rtol=0)
    drawn = replace(begun, out=tmp_path / "drawn", train=replace(begun.train, start_from=""))
    run_tiny(drawn)
    assert any((weights(drawn.out)[name] - wanted[name]).abs().max() > 1e-3 for name in learned)


def test_a_stopped_run_goes_on_without_the_other_one(tmp_path):
    run_tiny(make_run(tmp_path / "first"))
    settings = {"start_from": str(tmp_path / "first"), "batch_size": 4}
    run_tiny(make_run(tmp_path / "whole", **settings))
    stopped, _ = run_tiny(make_run(tmp_path / "second", time_limit="0.001s", **settings))
    assert stopped.status == "stopped"
    shutil.rmtree(tmp_path / "first")
    done, printed = run_tiny(make_run(tmp_path / "second", **settings))
    assert done.status == "done"
    assert "starting from" not in printed
    assert (tmp_path / "second/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"d_model": 16}, r"train\.start_from: \S+ is \(.*\) in .*first/model\.safetensors and \(.*\) in this model"),
        ({"layers": 1}, r"train\.start_from: \S+ is \(.*\) in .* and missing in this model"),
        ({"layers": 3}, r"train\.start_from: \S+ is missing in .* and \(.*\) in this model"),
    ],
)
def test_another_model_is_refused_and_nothing_written(tmp_path, model, message):
    run_tiny(make_run(tmp_path / "first"))
    with pytest.raises(ValueError, match=message) as caught:
        run_tiny(make_run(tmp_path / "second", model=model, start_from=str(tmp_path / "first")))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "second").exists()


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/model\.safetensors does not exist"):
        run_tiny(make_run(tmp_path / "second", start_from=str(tmp_path / "nowhere")))
    assert not (tmp_path / "second").exists()


def test_another_tokenizer_is_refused(tmp_path):
    run_tiny(make_run(tmp_path / "first"))
    task = replace(make_task(), tokenizer="{}")
    with pytest.raises(ValueError, match="the tokenizer of the data is not the one in"):
        run_tiny(make_run(tmp_path / "second", start_from=str(tmp_path / "first")), task)
    assert not (tmp_path / "second").exists()
