"""Speech Commands as raw samples: 10 words (SC10) or all 35, from the folders as published.

Every clip is standardised by one mean and one deviation, those of all training samples at 16 kHz, at either rate.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from chela.config import DataConfig
from chela.data.audio import moments, read_packed, read_wav, wav_length
from chela.data.batch import FixedSplit
from chela.data.cache import Arrays, prepared, prepared_rows
from chela.data.find import archive, find_folder, stamp
from chela.data.task import Task, differs, entropy, majority

Progress = Callable[[str], None] | None

RATE = SAMPLES = 16_000
"""Samples a second, and of a clip."""
TEN = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
OTHERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "bed", "bird", "cat", "dog")
OTHERS += ("happy", "house", "marvin", "sheila", "tree", "wow", "backward", "follow", "forward", "learn", "visual")
ALL = tuple(sorted(TEN + OTHERS))
LISTS = ("validation_list.txt", "testing_list.txt")
PACKED = ("labels.npz", "audio_0.npy.xz", "audio_1.npy.xz")
WHOLE_CLIPS, TEST_CLIPS = 34_975, 11_005
"""Clips of the ten words that have exactly 16,000 samples, and lines of the official testing list."""
FOLDERS = ("speech", "speech_commands_v0.02", "SpeechCommands/speech_commands_v0.02")
WANTED = (
    "the unpacked speech_commands_v0.02.tar.gz (a folder a word, validation_list.txt and testing_list.txt; "
    "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz)"
)
PARTS = ("train", "validation", "test")


def load(config: DataConfig, progress: Progress) -> Task:
    """The ten command words, clips of exactly 16,000 samples, in the official split (S4 and MEGA drew their own).

    Raises:
        ValueError: files missing, damaged, or not of one 16-bit channel at 16 kHz.
    """
    folder = find_folder(
        config.root,
        (*FOLDERS, "speech_commands10"),
        lambda folder: _published(folder, TEN) or all((folder / name).is_file() for name in PACKED),
        "speech",
        WANTED,
    )
    if _published(folder, TEN):
        raw, labels, sizes, shift_scale = _read(folder, TEN, config, "speech", progress)
        note = "official split, whole clips alone; published SC10 results use S4's random 70 / 15 / 15 %" + differs(
            "whole clips", len(labels), WHOLE_CLIPS
        )
        return _task("speech", TEN, raw, labels, sizes, shift_scale, config, note)
    key = {"files": [stamp(folder / name) for name in PACKED]}
    arrays = prepared(config.root, "speech-packed", key, lambda: _read_packed(folder, progress))
    sizes, shift_scale = arrays["sizes"], arrays["moments"]
    note = "official test clips alone, divided again by speaker: not comparable with published SC10 results"
    words = tuple(arrays["words"].tolist())
    return _task("speech", words, arrays["audio"], arrays["labels"], sizes, shift_scale, config, note)


def load_all(config: DataConfig, progress: Progress) -> Task:
    """All 35 words in the official split (S4, S5); clips shorter than a second end in zeros.

    Raises:
        ValueError: files missing, damaged, or not of one 16-bit channel at 16 kHz.
    """
    folder = find_folder(config.root, FOLDERS, lambda folder: _published(folder, ALL), "speech-35", WANTED)
    raw, labels, sizes, shift_scale = _read(folder, ALL, config, "speech-35", progress)
    note = "official split, short clips filled up with zeros" + differs("test clips", int(sizes[2]), TEST_CLIPS)
    return _task("speech-35", ALL, raw, labels, sizes, shift_scale, config, note)


def _task(
    name: str,
    words: tuple[str, ...],
    raw: np.ndarray,
    labels: np.ndarray,
    sizes: np.ndarray,
    shift_scale: np.ndarray,
    config: DataConfig,
    note: str,
) -> Task:
    step = RATE // config.rate
    shift, scale = map(float, shift_scale)
    cuts = np.cumsum(sizes)[:2]
    train, val, test = (
        FixedSplit(part[:, ::step], np.asarray(classes), shift, scale)
        for part, classes in zip(np.split(raw, cuts), np.split(labels, cuts), strict=True)
    )
    return Task(
        name=name,
        kind="classifier",
        train=train,
        val=val,
        test=test,
        inputs="real",
        channels=1,
        classes=len(words),
        names=words,
        max_length=SAMPLES // step,
        baselines={"majority class": majority(train.labels, test.labels)},
        chance_loss=entropy(train.labels),
        note=f"{note}; {config.rate} samples a second",
    )


def _published(folder: Path, words: tuple[str, ...]) -> bool:
    return all((folder / name).is_file() for name in LISTS) and all((folder / word).is_dir() for word in words)


def _read(
    folder: Path, words: tuple[str, ...], config: DataConfig, name: str, progress: Progress
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(samples int16 [clips, 16000], labels, sizes of the three parts, mean and deviation), training first."""
    whole = words == TEN
    key = {"lists": [stamp(folder / list_name) for list_name in LISTS], "words": words, "whole": whole}
    index = prepared(config.root, f"{name}-index", key, lambda: _index(folder, words, whole, progress))
    paths = index["paths"]

    def make(start: int, stop: int) -> np.ndarray:
        rows = np.zeros((stop - start, SAMPLES), dtype=np.int16)
        for row, path in zip(rows, paths[start:stop].tolist(), strict=True):
            clip = read_wav(folder / path, RATE)
            if len(clip) > SAMPLES:
                raise ValueError(f"{folder / path} has {len(clip):,} samples, clips have {SAMPLES:,} at most")
            row[: len(clip)] = clip
        return rows

    raw = prepared_rows(config.root, name, key, (len(paths), SAMPLES), np.int16, make, progress)
    train = raw[: index["sizes"][0]]
    shift_scale = prepared(config.root, f"{name}-moments", key, lambda: {"moments": moments(train)})["moments"]
    return raw, index["labels"], index["sizes"], shift_scale


def _index(folder: Path, words: tuple[str, ...], whole: bool, progress: Progress) -> Arrays:
    """Paths of the clips by part, word and name; `whole` leaves out those shorter than a second."""
    validation, testing = (set((folder / name).read_text(encoding="utf-8").split()) for name in LISTS)
    parts: list[list[tuple[str, int]]] = [[], [], []]
    for label, word in enumerate(words):
        if progress:
            progress(f"speech: looking through {word} ({label + 1} of {len(words)} words)")
        there = {f"{word}/{path.name}" for path in (folder / word).glob("*.wav")}
        missing = sorted(name for name in validation | testing if name.startswith(f"{word}/") and name not in there)
        if missing:
            raise ValueError(f"{folder / missing[0]} is on the official lists but not there: unpack the archive again")
        for name in sorted(there):
            if not whole or wav_length(folder / name, RATE) == SAMPLES:
                parts[2 if name in testing else 1 if name in validation else 0].append((name, label))
    for part, rows in zip(PARTS, parts, strict=True):
        if not rows:
            raise ValueError(f"{folder} has no clips for the {part} split: unpack the archive again")
    rows = [row for part in parts for row in part]
    return {
        "paths": np.array([path for path, _ in rows]),
        "labels": np.array([label for _, label in rows], dtype=np.uint8),
        "sizes": np.array([len(part) for part in parts]),
    }


def _read_packed(folder: Path, progress: Progress) -> Arrays:
    given = archive(folder / PACKED[0], "label words derived_split")
    labels, words, split = given["label"], given["words"], given["derived_split"]
    pieces = []
    for name in PACKED[1:]:
        if progress:
            progress(f"speech: unpacking {name}")
        pieces.append(read_packed(folder / name))
    audio = np.concatenate(pieces)
    if audio.shape != (len(labels), SAMPLES):
        raise ValueError(f"{folder} holds clips {audio.shape} for {len(labels)} labels: get the files again")
    parts = [np.flatnonzero(split == part) for part in PARTS]
    order = np.concatenate(parts)
    return {
        "audio": audio[order],
        "labels": labels[order],
        "words": words,
        "sizes": np.array([len(part) for part in parts]),
        "moments": moments(audio[parts[0]]),
    }
