import json

import numpy as np
import pytest

from chela.config import RunConfig
from chela.data import TASKS, load_task
from chela.presets import PRESETS, preset
from chela.record import from_dict, to_dict
from chela.training.checks import check_run

READERS_MISSING = ("retrieval", "pathfinder", "path-x")


def write_text(root):
    rows = [{"text": f"film {n}", "label": n % 2} for n in range(40)]
    for name in ("train", "test"):
        (root / "text").mkdir(exist_ok=True)
        (root / "text" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_image(root):
    (root / "image").mkdir()
    labels = np.arange(40, dtype=np.uint8) % 10
    for name in ("train", "test"):
        np.save(root / "image" / f"{name}_images.npy", np.zeros((40, 32, 32), dtype=np.uint8))
    np.savez(root / "image" / "labels.npz", train=labels, test=labels)


def write_bytes(root):
    (root / "bytes").mkdir()
    for name in ("train", "valid", "test"):
        (root / "bytes" / f"{name}.txt").write_text("a line of text\n" * 100)


WRITERS = {"text": write_text, "image": write_image, "bytes": write_bytes}


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


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in READERS_MISSING])
def test_a_preset_fits_its_task(name, tmp_path):
    run = preset(name)
    WRITERS.get(run.data.task, lambda root: None)(tmp_path)
    limits = {"root": tmp_path, "examples": 100} if run.data.task == "listops" else {"root": tmp_path}
    task = load_task(from_dict(type(run.data), {**to_dict(run.data), **limits}))
    check_run(run, task)
    if run.model.kernel_length and task.kind != "causal-lm":
        assert task.max_length > run.model.kernel_length / 2, "the kernel is longer than any sequence needs"


@pytest.mark.parametrize("name", READERS_MISSING)
def test_presets_without_data_say_so(name):
    assert "no data reader yet" in (PRESETS[name].__doc__ or "")
    with pytest.raises(ValueError, match="no reader"):
        load_task(preset(name).data)


def test_an_unknown_preset_names_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"unknown preset 'lisotps' \(did you mean 'listops'\?\); presets: digits, "):
        preset("lisotps")


def test_tiny_presets_share_the_full_ones_choices():
    full, tiny = preset("listops").model, preset("listops-tiny").model
    assert (tiny.pooling, tiny.prenorm, tiny.vocab, tiny.norm) == (full.pooling, full.prenorm, full.vocab, full.norm)
    assert (tiny.d_model, tiny.layers) < (full.d_model, full.layers)
