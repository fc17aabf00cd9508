"""Pathfinder and Path-X from the published folders."""

import numpy as np
import pytest
import torch

from chela.config import DataConfig
from chela.data import pathfinder_files
from chela.data.order import random_split
from data_kit import load_task, write_pathfinder  # pyrefly: ignore


def gray(n, k):
    return 16 * n + k


def test_the_split_is_torchs_own():
    parts = torch.utils.data.random_split(range(50), [40, 5, 5], torch.Generator().manual_seed(42))  # pyrefly: ignore
    for ours, theirs in zip(random_split(40, 5, 5), parts, strict=True):
        assert ours.tolist() == list(theirs.indices)


@pytest.mark.parametrize(("name", "size"), [("pathfinder", 32), ("path-x", 128)])
def test_images_in_the_order_of_the_lists_and_the_published_split(name, size, tmp_path):
    write_pathfinder(tmp_path, size)  # lists 0 and 1 of 12 images
    lines = []
    task = load_task(DataConfig(task=name, root=tmp_path), progress=lines.append)
    assert [len(task.train), len(task.val), len(task.test)] == [20, 2, 2]
    assert (task.inputs, task.channels, task.classes, task.max_length) == ("real", 1, 2, size * size)
    assert "24 images, where the published data have 200,000" in task.note
    listed = [(gray(n, k), k % 2) for n in range(2) for k in range(12)]
    for split, rows in zip((task.train, task.val, task.test), random_split(20, 2, 2), strict=True):
        batch = split.batch(np.arange(len(split)))
        assert batch.labels.tolist() == [listed[row][1] for row in rows]
        values = [(listed[row][0] - 127.5) / 127.5 for row in rows]
        np.testing.assert_allclose(batch.inputs[:, 0, 0].numpy(), values, atol=1e-6)
        assert bool((batch.inputs[:, 1, 0] == 1).all()), "rows from the top left"


def test_lists_are_taken_by_number(tmp_path):
    write_pathfinder(tmp_path, 32, per_list=1, lists=12)
    raw = load_task(DataConfig(task="pathfinder", root=tmp_path, encoding="tokens"))
    order = np.concatenate(random_split(10, 1, 1))
    tokens = [int(split.tokens[i, 0]) for split in (raw.train, raw.val, raw.test) for i in range(len(split))]
    assert tokens == [gray(int(n), 0) for n in order]


def test_pixels_as_tokens(tmp_path):
    write_pathfinder(tmp_path, 32)
    task = load_task(DataConfig(task="pathfinder", root=tmp_path, encoding="tokens"))
    assert (task.inputs, task.vocab) == ("tokens", 256)
    batch = task.train.batch(np.arange(3))
    assert batch.inputs.dtype == torch.int64
    assert batch.inputs[:, 1].tolist() == [255] * 3


def test_without_files_there_is_no_task(tmp_path):
    assert pathfinder_files.load(DataConfig(task="pathfinder", root=tmp_path), 32) is None
    write_pathfinder(tmp_path, 32)
    assert pathfinder_files.load(DataConfig(task="path-x", root=tmp_path), 128) is None


@pytest.mark.parametrize("place", ["lra_release", "lra_release/lra_release", "pathfinder", "."])
def test_places(place, tmp_path):
    folder = write_pathfinder(tmp_path / place, 32)
    assert pathfinder_files.find(tmp_path, 32) == folder


def test_the_archives_two_folders_are_not_guessed_between(tmp_path):
    for place in ("lra_release", "lra_release/lra_release"):
        write_pathfinder(tmp_path / place, 128)
    with pytest.raises(ValueError, match="two folders pathfinder128"):
        pathfinder_files.find(tmp_path, 128)
    mine = write_pathfinder(tmp_path, 128)
    assert pathfinder_files.find(tmp_path, 128) == mine


def other_size(path):
    from PIL import Image

    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(path)


DAMAGE = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-30]), r"sample_3\.png is not a whole image"),
    "empty": (lambda path: path.write_bytes(b""), r"sample_3\.png is not a whole image"),
    "missing": (lambda path: path.unlink(), r"sample_3\.png is in the metadata but not there"),
    "another size": (other_size, r"sample_3\.png has 8 x 8 pixels instead of 32 x 32"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_images_are_named(name, tmp_path):
    folder = write_pathfinder(tmp_path, 32)
    damage, part = DAMAGE[name]
    damage(folder / "imgs" / "1" / "sample_3.png")
    with pytest.raises(ValueError, match=part):
        load_task(DataConfig(task="pathfinder", root=tmp_path))


@pytest.mark.parametrize("line", ["imgs/0 sample_0.png 0\n", "imgs/0 sample_0.png 0 2 1.0\n", "\n"])
def test_wrong_lines_are_named(line, tmp_path):
    path = write_pathfinder(tmp_path, 32) / "metadata" / "1.npy"
    path.write_text(path.read_text() + line)
    with pytest.raises(ValueError, match=r"1\.npy line 13 is not folder, file, index, label"):
        load_task(DataConfig(task="pathfinder", root=tmp_path))


def test_without_pillow_the_package_is_named(tmp_path, monkeypatch):
    write_pathfinder(tmp_path, 32)
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ValueError, match=r"needs the package pillow: pip install 'chela\[data\]'"):
        load_task(DataConfig(task="pathfinder", root=tmp_path))
