"""Recordings as 16-bit samples: WAV files, and clips packed without loss."""

import wave
from pathlib import Path

import numpy as np

from chela.data.find import array


def wav_length(path: Path, rate: int) -> int:
    """Samples of a WAV file, from its header.

    Raises:
        ValueError: not a whole WAV file of one 16-bit channel at `rate` samples a second.
    """
    return _wav(path, rate, read=False)[0]


def read_wav(path: Path, rate: int) -> np.ndarray:
    """Samples of a WAV file, int16 [samples].

    Raises:
        ValueError: not a whole WAV file of one 16-bit channel at `rate` samples a second.
    """
    count, content = _wav(path, rate, read=True)
    samples = np.frombuffer(content, dtype="<i2")
    if len(samples) != count:
        raise ValueError(f"{path} is cut off: {len(samples):,} of {count:,} samples are there, unpack it again")
    return samples


def _wav(path: Path, rate: int, *, read: bool) -> tuple[int, bytes]:
    try:
        with wave.open(str(path), "rb") as file:
            form = (file.getnchannels(), 8 * file.getsampwidth(), file.getframerate())
            if form != (1, 16, rate):
                raise ValueError(
                    f"{path} has {form[0]} channel(s) of {form[1]} bits at {form[2]} samples a second, "
                    f"wanted one of 16 bits at {rate}"
                )
            count = file.getnframes()
            return count, file.readframes(count) if read else b""
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: unpack the archive again") from None
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path} is not a whole WAV file ({error or 'cut off'}): unpack it again") from None


def read_packed(path: Path) -> np.ndarray:
    """Clips packed as first differences, zig-zag coded, low and high bytes apart: .npy.xz uint8 [2, ...].

    Returns:
        int16 [...]; the differences run along the last axis.

    Raises:
        ValueError: the file is damaged.
    """
    planes = array(path)
    if planes.dtype != np.uint8 or len(planes) != 2:
        raise ValueError(f"{path} does not hold packed clips, but {planes.dtype} {planes.shape}")
    coded = planes[0] | (planes[1].astype(np.uint16) << 8)
    return np.cumsum(((coded >> 1) ^ -(coded & 1)).view(np.int16), axis=-1, dtype=np.int16)


def moments(samples: np.ndarray, block: int = 1 << 22) -> np.ndarray:
    """Mean and deviation over all samples, float64 [2]; a block at a time.

    Args:
        samples: int16, any shape; memory-mapped or not.
        block: samples looked at at once.
    """
    rows = max(1, block // max(1, samples[:1].size))
    total, squares = 0, 0
    for start in range(0, len(samples), rows):
        piece = np.asarray(samples[start : start + rows], dtype=np.int64)
        total, squares = total + int(piece.sum()), squares + int((piece * piece).sum())
    mean = total / samples.size
    return np.array([mean, (squares / samples.size - mean * mean) ** 0.5])
