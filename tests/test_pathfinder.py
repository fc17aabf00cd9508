import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from chela import data
from chela.config import DataConfig
from chela.data import cache, pathfinder
from chela.data.pathfinder import Painters, first_images
from chela.data.pathfinder_dashes import PATH_X, PATHFINDER
from chela.data.pathfinder_images import scenes
from cli_kit import succeed  # pyrefly: ignore
from data_kit import write_pathfinder  # pyrefly: ignore

load_task: Any = data.load_task  # its splits have the fields of their own kind

SCRIPT = """
from pathlib import Path
from chela.config import DataConfig
from chela.data import cache, load_task, pathfinder

cache.BLOCK_BYTES, pathfinder.PIECE_BYTES = 1 << 19, 1 << 17  # 512 images, and four pieces for two processes

if __name__ == "__main__":
    load_task(DataConfig(task="pathfinder", root=Path({root!r}), examples=2560))
"""
TINY = DataConfig(task="pathfinder", examples=64)


def images_of(split):
    return np.asarray(split.raw)


def test_the_task_is_generated_once_and_cached(tmp_path, monkeypatch):
    task = load_task(replace(TINY, root=tmp_path))
    assert [len(task.train), len(task.val), len(task.test)] == [64, 8, 8]
    assert (task.inputs, task.channels, task.classes, task.max_length) == ("real", 1, 2, 1024)
    assert "data.seed 0, up to 5 distractors" in task.note
    batch = task.train.batch(np.array([3, 5]))
    assert batch.inputs.shape == (2, 1024, 1)
    assert (float(batch.inputs.min()), float(batch.inputs.max())) == (-1, 1)
    for number, split in enumerate((task.train, task.val, task.test)):
        found = scenes(PATHFINDER, seed=0, split=number, indices=np.arange(len(split)))
        assert np.array_equal(images_of(split), found.pixels.reshape(len(split), -1))
        assert np.array_equal(split.labels, found.labels)
    monkeypatch.setattr(pathfinder, "scenes", None)
    again = load_task(replace(TINY, root=tmp_path))
    assert np.array_equal(images_of(again.train), images_of(task.train))


def test_settings_change_the_images(tmp_path):
    usual = load_task(replace(TINY, root=tmp_path))
    tokens = load_task(replace(TINY, root=tmp_path, encoding="tokens"))
    assert (tokens.inputs, tokens.vocab) == ("tokens", 256)
    assert np.array_equal(tokens.train.tokens, images_of(usual.train))
    for config in (replace(TINY, seed=1), replace(TINY, distractors=2)):
        other = load_task(replace(config, root=tmp_path))
        assert not np.array_equal(images_of(other.train), images_of(usual.train))
    fewer = load_task(replace(TINY, root=tmp_path, examples=16))
    assert np.array_equal(images_of(fewer.train), images_of(usual.train)[:16])


def test_path_x_is_the_larger_one(tmp_path):
    task = load_task(DataConfig(task="path-x", root=tmp_path, examples=8, distractors=17))
    assert (len(task.train), task.max_length) == (8, 16_384)
    assert "up to 17 distractors" in task.note
    found = scenes(replace(PATH_X, distractors=17), seed=0, split=0, indices=np.arange(8))
    assert np.array_equal(images_of(task.train), found.pixels.reshape(8, -1))


def test_what_was_stopped_goes_on_at_the_last_block(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK_BYTES", 16 << 10)  # 16 images
    whole = images_of(load_task(replace(TINY, root=tmp_path / "whole")).train)
    drawn, paint = [], pathfinder._paint

    def failing(job):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(job[3:])
        return paint(job)

    monkeypatch.setattr(pathfinder, "_paint", failing)
    config = replace(TINY, root=tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        load_task(config)
    assert drawn == [(0, 16), (16, 32)]
    monkeypatch.setattr(pathfinder, "_paint", lambda job: drawn.append(job[3:]) or paint(job))
    assert np.array_equal(images_of(load_task(config).train), whole)
    assert drawn[2:4] == [(16, 32), (32, 48)]  # the last one again: a power cut may have torn it


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_processes(monkeypatch):
    monkeypatch.setattr(pathfinder, "PIECE_BYTES", 16 << 10)
    with Painters(PATHFINDER, 3, processes=2) as several, Painters(PATHFINDER, 3, processes=1) as one:
        assert np.array_equal(several.paint(1, 5, 85), one.paint(1, 5, 85))


@pytest.mark.slow
def test_a_killed_preparation_goes_on(tmp_path):
    """Killed after some blocks, with its processes; what was whole stays, and the set is right in the end."""
    script = tmp_path / "prepare.py"
    script.write_text(SCRIPT.format(root=str(tmp_path)))
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    started = time.monotonic()
    part = None
    while time.monotonic() - started < 120:
        part = next(tmp_path.glob("prepared/pathfinder-train-*.part.tmp/rows.npy"), None)
        if part and part.stat().st_size > 2 << 19:
            break
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert part
    before = part.stat().st_size
    assert 2 << 19 < before < 5 << 19
    kept = np.fromfile(part, dtype=np.uint8, count=2 << 19)
    found = scenes(PATHFINDER, seed=0, split=0, indices=np.arange(4))
    assert np.array_equal(kept[128 : 128 + 4096], found.pixels.ravel())
    again = subprocess.run([sys.executable, str(script)], check=False)
    assert again.returncode == 0
    rows = np.load(next(tmp_path.glob("prepared/pathfinder-train-*/rows.npy")), mmap_mode="r")
    assert rows.shape == (2560, 1024)
    some = np.append(np.arange(0, 2560, 37), 2559)
    assert np.array_equal(rows[some], scenes(PATHFINDER, seed=0, split=0, indices=some).pixels.reshape(len(some), -1))


def test_published_files_are_read_instead_unless_settings_are_asked_for(tmp_path):
    write_pathfinder(tmp_path, 32)
    assert "published" in load_task(DataConfig(task="pathfinder", root=tmp_path)).note
    assert "generated" in load_task(DataConfig(task="pathfinder", root=tmp_path, examples=8)).note
    pixels, labels, note = first_images(DataConfig(task="pathfinder", root=tmp_path), 5, None)
    task = load_task(DataConfig(task="pathfinder", root=tmp_path))
    assert np.array_equal(pixels.reshape(5, -1), images_of(task.train)[:5])
    assert np.array_equal(labels, task.train.labels[:5])
    assert "published" in note


@pytest.mark.parametrize(("name", "rules"), [("pathfinder", PATHFINDER), ("path-x", PATH_X)])
def test_the_sheet_shows_the_first_images_without_preparing_the_set(name, rules, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    said = succeed("data", name, "--show", "--root", tmp_path / "data", "--seed", 4)
    assert f"{name}.png: 24 images" in said
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "data").exists()
    pixels, labels, _ = first_images(DataConfig(task=name, root=tmp_path, seed=4), 2, None)
    found = scenes(rules, seed=4, split=0, indices=np.arange(2))
    assert np.array_equal(pixels, found.pixels)
    assert np.array_equal(labels, found.labels)
