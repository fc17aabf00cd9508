"""Prepared data: whole or not at all; large arrays are made block by block, stopped and gone on with."""

import os
import platform
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from chela.data import cache
from chela.data.cache import prepared, prepared_rows


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(cache, "BLOCK_BYTES", 40)  # two rows of five int32


def rows(start, stop):
    return np.arange(start * 5, stop * 5, dtype=np.int32).reshape(-1, 5)


def stopping_at(row):
    def produce(start, stop):
        if start == row:
            raise KeyboardInterrupt
        return rows(start, stop)

    return produce


def make(root, produce, **key):
    return prepared_rows(root, "numbers", {"k": 1, **key}, (7, 5), np.int32, produce)


def test_all_rows_are_made_once(tmp_path):
    calls = []

    def produce(start, stop):
        calls.append((start, stop))
        return rows(start, stop)

    found = make(tmp_path, produce)
    assert calls == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert np.array_equal(found, rows(0, 7))
    assert np.array_equal(make(tmp_path, produce), found)
    assert len(calls) == 4
    make(tmp_path, produce, other=2)
    assert len(calls) == 8


def test_what_the_disk_cannot_hold_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda place: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match=r"numbers would take .* make room, or name another folder"):
        make(tmp_path, rows)  # 140 bytes
    assert not [*tmp_path.rglob("*.npy")]
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda place: SimpleNamespace(free=140))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, stopping_at(6))
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda place: SimpleNamespace(free=20))  # one row is left
    assert np.array_equal(make(tmp_path, rows), rows(0, 7))


@pytest.mark.parametrize("stop_at", [0, 2, 6])
def test_a_stopped_preparation_goes_on_where_it_was(stop_at, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, stopping_at(stop_at))
    assert [path.suffix for path in (tmp_path / "prepared").iterdir()] == [".tmp"]
    began = []
    found = make(tmp_path, lambda start, stop: began.append(start) or rows(start, stop))
    assert began == [start for start in (0, 2, 4, 6) if start >= stop_at - 2], "the last block may be torn"
    assert np.array_equal(found, rows(0, 7))
    assert [path.suffix for path in (tmp_path / "prepared").iterdir()] == [""]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content + content[-13:], id="a further block half written"),
        pytest.param(lambda content: content[:-40] + bytes(40), id="the last block without its bytes"),
    ],
)
def test_what_a_power_cut_left_is_made_again(damage, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, stopping_at(4))
    (path,) = (tmp_path / "prepared").glob("*/rows.npy")
    path.write_bytes(damage(path.read_bytes()))
    assert np.array_equal(make(tmp_path, rows), rows(0, 7))


def test_two_at_once_write_the_same(tmp_path):
    """While one makes its first rows, another finishes the whole array."""

    def overtaken(start, stop):
        if start == 2:
            make(tmp_path, rows)
        return rows(start, stop)

    assert np.array_equal(make(tmp_path, overtaken), rows(0, 7))
    assert np.array_equal(make(tmp_path, rows), rows(0, 7))
    assert [path.suffix for path in (tmp_path / "prepared").iterdir()] == [""]


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.raises(ValueError, match=r"cannot write prepared data .*No space left on device.*--data\.root"):
        make(tmp_path, rows)


def test_damaged_rows_are_named(tmp_path):
    make(tmp_path, rows)
    (path,) = (tmp_path / "prepared").glob("*/rows.npy")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"prepared data are damaged .* delete"):
        make(tmp_path, rows)


KILLED = """
import os, pathlib, signal, sys
from chela.data.cache import prepared

prepared(pathlib.Path(sys.argv[1]), "words", {}, lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_what_a_killed_process_left_is_deleted_when_the_same_is_prepared_again(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "prepared").iterdir()
    stem = left.name.removesuffix(f".{platform.node()}.{left.name.split('.')[-2]}.tmp")
    here = platform.node()
    others = {f"{stem}.{here}.{os.getppid()}.tmp", f"{stem}.{here}x.1.tmp", f"{stem}.part.tmp", f"x{left.name}"}
    for name in (*others, f"{stem}.{here}.{os.getpid()}.tmp"):
        left.with_name(name).mkdir()
    found = prepared(tmp_path, "words", {}, lambda: {"a": np.arange(3)})
    assert found["a"].tolist() == [0, 1, 2]
    remaining = {path.name for path in (tmp_path / "prepared").iterdir()}
    assert remaining == {stem, *others}, "living processes, other machines and other data keep theirs"
