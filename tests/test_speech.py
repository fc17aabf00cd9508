"""Recordings: Speech Commands with 10 and 35 words, and the free spoken digits."""

import lzma

import numpy as np
import pytest
import torch

from chela.config import DataConfig
from chela.data import RaggedReal
from chela.data.audio import moments, read_packed, read_wav
from chela.data.speech import ALL, TEN
from data_kit import load_task, shared, speech_samples, write_speech, write_spoken_digits, write_wav  # pyrefly: ignore


def pack(path, samples):
    """The packing of `read_packed`, by its description: first differences, zig-zag, low and high bytes apart."""
    difference = np.diff(samples.astype(np.int16), axis=-1, prepend=np.int16(0))
    coded = ((difference << 1) ^ (difference >> 15)).view(np.uint16)
    with lzma.open(path, "wb") as file:
        np.save(file, np.stack([coded & 255, coded >> 8]).astype(np.uint8))


def test_packed_clips_come_back(tmp_path):
    extremes = np.array([[0, -1, 1, 32767, -32768, -32768, 32767], [5, 4, 3, 2, 1, 0, -1]], dtype=np.int16)
    pack(tmp_path / "a.npy.xz", extremes)
    assert np.array_equal(read_packed(tmp_path / "a.npy.xz"), extremes)


def test_moments_do_not_depend_on_the_block():
    samples = np.random.default_rng(0).integers(-32768, 32767, (37, 11), dtype=np.int16)
    wanted = [samples.mean(dtype=np.float64), samples.std(dtype=np.float64)]
    for block in (1, 50, 10**6):
        np.testing.assert_allclose(moments(samples, block), wanted, rtol=1e-12)


def test_ragged_values_are_standardised_and_padded_with_the_mean():
    split = RaggedReal(np.array([1, 2, 3, 4, 5, 6], dtype=np.int16), np.array([2, 6]), np.array([0, 1]), 2.0, 0.5)
    batch = split.batch(np.array([0, 1]))
    assert batch.inputs.squeeze(-1).tolist() == [[-2, 0, 0, 0], [2, 4, 6, 8]]
    assert batch.mask is not None
    assert batch.mask.sum(1).tolist() == [2, 4]
    assert split.lengths().tolist() == [2, 4]
    assert batch.inputs.dtype == torch.float32


def test_ten_words_in_the_official_split_without_short_clips(tmp_path):
    write_speech(tmp_path, TEN, short=(4,))
    task = load_task(DataConfig(task="speech", root=tmp_path))
    assert [len(task.train), len(task.val), len(task.test)] == [20, 10, 10]
    assert (task.inputs, task.channels, task.classes, task.max_length, task.names) == ("real", 1, 10, 16_000, TEN)
    assert "whole clips, where the published data have 34,975" in task.note
    train = np.stack([speech_samples(word, number) for word in TEN for number in (2, 3)]).astype(np.float64)
    batch = task.test.batch(np.array([9]))
    assert int(batch.labels[0]) == TEN.index("go") == 9
    wanted = (speech_samples("go", 0) - train.mean()) / train.std()
    np.testing.assert_allclose(batch.inputs[0, :, 0].numpy(), wanted, atol=1e-5)


def test_half_the_rate_is_every_second_sample(tmp_path):
    write_speech(tmp_path, TEN)
    full, half = (load_task(DataConfig(task="speech", root=tmp_path, rate=rate)) for rate in (0, 8000))
    rows = np.array([0, 5])
    assert half.max_length == 8000
    assert torch.equal(half.val.batch(rows).inputs, full.val.batch(rows).inputs[:, ::2])


def test_all_words_and_short_clips_end_in_zeros(tmp_path):
    assert len(set(ALL)) == 35
    write_speech(tmp_path, ALL, short=(0,))
    task = load_task(DataConfig(task="speech-35", root=tmp_path))
    assert [len(task.train), len(task.val), len(task.test)] == [3 * 35, 35, 35]
    assert task.names == ALL
    row = task.test.raw[ALL.index("wow")]
    assert np.array_equal(row[:9000], speech_samples("wow", 0, 9000))
    assert not row[9000:].any()


def test_a_second_reading_asks_no_clip(tmp_path):
    folder = write_speech(tmp_path, TEN)
    first = load_task(DataConfig(task="speech", root=tmp_path)).train.batch(np.arange(4)).inputs
    (folder / "yes" / "ab2_nohash_0.wav").write_bytes(b"")
    assert torch.equal(load_task(DataConfig(task="speech", root=tmp_path)).train.batch(np.arange(4)).inputs, first)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGE = {
    "cut off": (cut, r"ab3_nohash_0\.wav is cut off: 15,500 of 16,000 samples"),
    "empty": (lambda path: path.write_bytes(b""), r"ab3_nohash_0\.wav is not a whole WAV file"),
    "no WAV": (lambda path: path.write_bytes(b"x" * 99), r"ab3_nohash_0\.wav is not a whole WAV file"),
    "another rate": (
        lambda path: write_wav(path, np.zeros(16_000), 8000),
        "at 8000 samples a second, wanted one of 16",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_clips_are_named_and_leave_nothing_prepared(name, tmp_path):
    damage, part = DAMAGE[name]
    damage(write_speech(tmp_path, TEN) / "stop" / "ab3_nohash_0.wav")
    with pytest.raises(ValueError, match=part):
        load_task(DataConfig(task="speech", root=tmp_path))
    finished = [path.name for path in (tmp_path / "prepared").iterdir() if path.suffix != ".tmp"]
    assert all(name.startswith("speech-index-") for name in finished)


def test_a_clip_of_the_lists_that_is_missing_is_named(tmp_path):
    (write_speech(tmp_path, TEN) / "off" / "ab1_nohash_0.wav").unlink()
    with pytest.raises(ValueError, match=r"off/ab1_nohash_0\.wav is on the official lists but not there"):
        load_task(DataConfig(task="speech", root=tmp_path))


def test_spoken_digits_in_the_published_split(tmp_path):
    write_spoken_digits(tmp_path)
    task = load_task(DataConfig(task="spoken-digits", root=tmp_path))
    assert [len(task.train), len(task.val), len(task.test)] == [20, 50, 50]
    assert (task.channels, task.classes, task.max_length) == (1, 10, 301)
    assert "not the 3,000 recordings of the known checksum" in task.note
    raw = task.test.raw[: task.test.ends[0]]
    assert np.array_equal(raw, speech_samples("digit0", 0, 200))
    values = task.train.batch(np.arange(20))
    assert abs(float(values.inputs[values.mask.unsqueeze(-1)].std()) - 1) < 0.01
    assert load_task(DataConfig(task="spoken-digits", root=tmp_path, max_length=64)).max_length == 64


def test_damaged_digits_are_named(tmp_path):
    folder = write_spoken_digits(tmp_path)
    (folder / "recordings" / "7_ann_11.wav").write_bytes(b"")
    with pytest.raises(ValueError, match=r"7_ann_11\.wav is not a whole WAV file"):
        load_task(DataConfig(task="spoken-digits", root=tmp_path))


def test_packed_digits_equal_the_wav_files(tmp_path):
    recordings = sorted(
        (write_spoken_digits(tmp_path) / "recordings").glob("*.wav"),
        key=lambda p: (p.name[0], int(p.stem.split("_")[2])),
    )
    from_files = load_task(DataConfig(task="spoken-digits", root=tmp_path))
    clips = [read_wav(path, 8000) for path in recordings]
    packed = tmp_path / "other" / "spoken-digits"
    packed.mkdir(parents=True)
    pack(packed / "audio.npy.xz", np.concatenate(clips))
    names = [path.stem.split("_") for path in recordings]
    np.savez(
        packed / "labels.npz",
        offsets=np.cumsum([0, *map(len, clips)]),
        label=np.array([int(name[0]) for name in names]),
        index=np.array([int(name[2]) for name in names]),
    )
    from_pack = load_task(DataConfig(task="spoken-digits", root=tmp_path / "other"))
    for part in ("train", "val", "test"):
        ours, theirs = getattr(from_pack, part), getattr(from_files, part)
        assert np.array_equal(ours.raw, theirs.raw)
        assert np.array_equal(ours.labels, theirs.labels)
    (packed / "audio.npy.xz").write_bytes((packed / "audio.npy.xz").read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"audio\.npy\.xz is damaged"):
        load_task(DataConfig(task="spoken-digits", root=tmp_path / "other"))


def test_the_real_digits(tmp_path):
    (tmp_path / "fsdd").symlink_to(shared("fsdd"))
    task = load_task(DataConfig(task="spoken-digits", root=tmp_path))
    assert [len(task.train), len(task.val), len(task.test)] == [2400, 300, 300]
    assert sum(int(split.ends[-1]) for split in (task.train, task.val, task.test)) == 10_498_424
    assert np.bincount(task.test.labels).tolist() == [30] * 10
    assert task.max_length == 18_262
    assert "checksum" not in task.note, "the samples are those of the published recordings"


@pytest.mark.slow
def test_the_real_words(tmp_path):
    (tmp_path / "speech").symlink_to(shared("speech_commands10"))
    task = load_task(DataConfig(task="speech", root=tmp_path))
    assert [len(task.train), len(task.val), len(task.test)] == [2492, 712, 870]
    assert task.names == TEN
    labels = np.concatenate([split.labels for split in (task.train, task.val, task.test)])
    assert np.bincount(labels).tolist() == [419, 405, 425, 406, 412, 396, 396, 402, 411, 402]
    assert "not comparable" in task.note
    values = task.train.batch(np.arange(len(task.train))).inputs
    assert abs(float(values.std()) - 1) < 1e-3
