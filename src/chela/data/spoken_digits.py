"""The Free Spoken Digit Dataset: 3,000 recordings of ten digits by six speakers, 8 kHz, of varying length."""

import hashlib
import re
from pathlib import Path

import numpy as np

from chela.config import DataConfig
from chela.data.audio import moments, read_packed, read_wav
from chela.data.cache import Arrays, prepared
from chela.data.find import archive, find_folder, stamp
from chela.data.ragged import RaggedReal
from chela.data.task import Task, entropy, majority

RATE = 8000
NAME = re.compile(r"(\d)_([a-z]+)_(\d+)\.wav")
PACKED = ("audio.npy.xz", "labels.npz")
FOLDERS = ("spoken-digits", "fsdd", "free-spoken-digit-dataset")
WANTED = (
    "the folder recordings of the Free Spoken Digit Dataset (https://github.com/Jakobovski/free-spoken-digit-dataset)"
)
DIGEST = "801bcecb25fa3bfb54fb3c0b1d94732d8456ce5b0c1f036667852a341a3aacd4"
"""SHA-256 of all samples of the 3,000 recordings, by digit, speaker and index."""
CUTS = (5, 10)
"""Recordings 0 to 4 of every digit and speaker are the published test set; 5 to 9 we hold out for validation."""


def load(config: DataConfig) -> Task:
    """Recordings standardised by mean and deviation of the training samples, padded behind a mask.

    Raises:
        ValueError: files missing or damaged.
    """
    folder = find_folder(config.root, FOLDERS, lambda folder: bool(_files(folder)), "spoken-digits", WANTED)
    files = _files(folder)
    key = {"files": [stamp(path) for path in files]}
    read = _read_packed if files[0].name in PACKED else _read_wavs
    arrays = prepared(config.root, "spoken-digits", key, lambda: _by_part(*read(files)))
    remark = "" if arrays["digest"].tobytes().hex() == DIGEST else "; not the 3,000 recordings of the known checksum"
    shift, scale = map(float, arrays["moments"])
    parts = [(arrays[f"audio_{i}"], arrays[f"ends_{i}"], np.asarray(arrays[f"labels_{i}"])) for i in range(3)]
    train, val, test = (RaggedReal(*part, shift, scale, config.max_length) for part in parts)
    return Task(
        name="spoken-digits",
        kind="classifier",
        train=train,
        val=val,
        test=test,
        inputs="real",
        channels=1,
        classes=10,
        max_length=max(int(split.lengths().max()) for split in (train, val, test)),
        baselines={"majority class": majority(train.labels, test.labels)},
        chance_loss=entropy(train.labels),
        note=f"published test set, all speakers in every split{remark}",
    )


def _files(folder: Path) -> list[Path]:
    """The two packed files, or the published recordings by digit, speaker and index; empty where there are none."""
    packed = [folder / name for name in PACKED]
    if all(path.is_file() for path in packed):
        return packed
    found = (NAME.fullmatch(path.name) for path in (folder / "recordings").glob("*.wav"))
    ordered = sorted((m[1], m[2], int(m[3])) for m in found if m)
    return [folder / "recordings" / f"{digit}_{speaker}_{index}.wav" for digit, speaker, index in ordered]


def _read_wavs(files: list[Path]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """(recordings, digits, indices)."""
    names = [path.stem.split("_") for path in files]
    digits, indices = (np.array([int(name[place]) for name in names]) for place in (0, 2))
    return [read_wav(path, RATE) for path in files], digits, indices


def _read_packed(files: list[Path]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    samples = read_packed(files[0])
    labels = archive(files[1], "offsets label index")
    offsets, digits, indices = labels["offsets"], labels["label"], labels["index"]
    if offsets[-1] != len(samples) or len(digits) != len(offsets) - 1:
        raise ValueError(f"{files[0]} and {files[1].name} do not belong together: get them again")
    return np.split(samples, offsets[1:-1]), digits, indices


def _by_part(clips: list[np.ndarray], digits: np.ndarray, indices: np.ndarray) -> Arrays:
    digest = hashlib.sha256(b"".join(clip.astype("<i2").tobytes() for clip in clips)).digest()
    arrays: Arrays = {"digest": np.frombuffer(digest, dtype=np.uint8)}
    test, val = indices < CUTS[0], (indices >= CUTS[0]) & (indices < CUTS[1])
    for part, member in enumerate((~(test | val), val, test)):
        rows = np.flatnonzero(member)
        if not len(rows):
            raise ValueError("the spoken digits lack recordings: every speaker has 0_NAME_0.wav to 9_NAME_49.wav")
        arrays[f"audio_{part}"] = np.concatenate([clips[row] for row in rows]).astype(np.int16)
        arrays[f"ends_{part}"] = np.cumsum([len(clips[row]) for row in rows], dtype=np.int64)
        arrays[f"labels_{part}"] = digits[rows].astype(np.uint8)
    return {**arrays, "moments": moments(arrays["audio_0"])}
