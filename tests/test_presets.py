from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from chela.config import RunConfig
from chela.data import TASKS, load_task
from chela.data.speech import TEN
from chela.models import build, save_model
from chela.presets import PRESETS, preset
from chela.record import from_dict, to_dict
from chela.training.checks import check_run
from data_kit import (  # pyrefly: ignore
    write_bytes,
    write_image,
    write_pathfinder,
    write_retrieval,
    write_speech,
    write_text,
)

WRITERS = {
    "text": write_text,
    "retrieval": write_retrieval,
    "image": write_image,
    "pathfinder": lambda root: write_pathfinder(root, 32),
    "path-x": lambda root: write_pathfinder(root, 128),
    "speech": lambda root: write_speech(root, TEN),
    "bytes": write_bytes,
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_named_explained_and_on_record(name):
    run = preset(name)
    assert run.preset == name
    first = (PRESETS[name].__doc__ or "").splitlines()[0]
    assert 20 < len(first) < 110
    assert first.endswith(".")
    assert from_dict(RunConfig, to_dict(run)) == run
    assert run.optim.warmup < run.train.steps
    assert run.data.task in TASKS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_its_task(name, tmp_path):
    run = preset(name)
    WRITERS.get(run.data.task, lambda root: None)(tmp_path)
    limits = {"root": tmp_path, "examples": 100} if run.data.task == "listops" else {"root": tmp_path}
    if run.data.task == "novels":  # which have checksums: any text is read by the same reader
        write_bytes(tmp_path)
        limits["task"] = "bytes"
    task = load_task(from_dict(type(run.data), {**to_dict(run.data), **limits}))
    check_run(run, task)
    if run.model.kernel_length and task.kind != "causal-lm":
        assert task.max_length > run.model.kernel_length / 2, "the kernel is longer than any sequence needs"


def test_an_unknown_preset_names_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"unknown preset 'lisotps' \(did you mean 'listops'\?\); presets: digits, "):
        preset("lisotps")


def test_tiny_presets_share_the_full_ones_choices():
    full, tiny = preset("listops").model, preset("listops-tiny").model
    assert (tiny.pooling, tiny.prenorm, tiny.vocab, tiny.norm) == (full.pooling, full.prenorm, full.vocab, full.norm)
    assert (tiny.d_model, tiny.layers) < (full.d_model, full.layers)


@pytest.mark.parametrize("name", ["lm-chela", "lm-transformer", "lm-gla"])
def test_language_models_side_by_side_have_40_million_parameters_and_differ_in_model_and_rate_alone(name):
    run, first = preset(name), preset("lm-chela")
    same_rate = replace(run.optim, lr=first.optim.lr)
    assert replace(run, preset="", model=first.model, optim=same_rate) == replace(first, preset="")
    assert run.data.max_length == 8192
    if run.model.mixer == "gla" and not find_spec("fla"):
        pytest.skip("flash-linear-attention is not installed")
    assert sum(p.numel() for p in build(run.model).parameters()) == pytest.approx(40e6, rel=0.03)


@pytest.mark.parametrize(
    "name", ["lm-small", "listops", "text", "retrieval", "image", "pathfinder", "path-x", "speech"]
)
def test_weights_that_can_lie_in_a_repository_take_8_megabytes_at_most(name, tmp_path):
    matrices = torch.float16 if name == "image" else None
    save_model(build(preset(name).model), tmp_path / "model.safetensors", matrices=matrices)
    assert (tmp_path / "model.safetensors").stat().st_size <= 8_000_000
