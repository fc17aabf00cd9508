"""Each task in its other encodings: characters, pixels as tokens, colour; and who takes which setting."""

import json

import numpy as np
import pytest
import torch

from chela.config import DataConfig
from chela.data import READERS, FixedSplit, FixedTokens, RaggedSplit
from chela.data.characters import TextEncoding, encode, pack, unpack, vocabulary
from chela.data.images import DEVIATIONS, MEANS
from data_kit import load_task, shared, write_image  # pyrefly: ignore

TEXTS = ["aab", "b\u00e9\u00e9", "", "a\U0001f600z"]


def test_texts_are_packed_and_come_back():
    packed = pack(text.encode() for text in TEXTS)
    assert [text.decode() for text in unpack(packed)] == TEXTS
    assert TextEncoding().sequences(packed, 0)[1].tolist() == [byte + 1 for byte in TEXTS[1].encode()]


def test_rare_characters_are_unknown():
    texts = [text.encode() for text in TEXTS]
    assert vocabulary(texts, limit=10).tolist() == sorted(map(ord, "ab\u00e9z\U0001f600"))
    known = vocabulary(texts, limit=10, floor=2)
    assert known.tolist() == sorted(map(ord, "ab\u00e9"))
    assert vocabulary(texts, limit=2, floor=2).tolist() == [ord("a")], "what is cut off does not count"
    encoding = TextEncoding(known)
    sequences = encoding.sequences(encode(texts, known), limit=4)
    assert [sequences[i].tolist() for i in range(4)] == [[3, 3, 4, 2], [4, 5, 5, 2], [2], [3, 1, 1, 2]]
    assert encoding.vocab == 6
    assert encoding.decode(sequences[3]) == "a\ufffd\ufffd"
    assert sequences.lengths().tolist() == [4, 4, 1, 4]


def test_bytes_that_are_no_text_are_read_all_the_same():
    known = vocabulary([b"a\xff"], limit=9)
    assert encode([b"a\xff\xff"], known)["tokens"].tolist() == [3, 4, 4]


def test_the_end_of_a_text_stands_within_the_limit():
    split = RaggedSplit(np.arange(3, 9, dtype=np.uint8), np.array([4, 6]), np.array([0, 1]), limit=3, last=2)
    batch = split.batch(np.array([0, 1]))
    assert batch.inputs.tolist() == [[3, 4, 2], [7, 8, 2]]
    assert split.lengths().tolist() == [3, 3]


def test_reviews_as_characters(tmp_path):
    (tmp_path / "text").mkdir()
    rows = [{"text": f"film \u00e9{'q' if n == 3 else ''}", "label": n % 2} for n in range(40)]
    for name in ("train", "test"):
        (tmp_path / "text" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = load_task(DataConfig(task="text", root=tmp_path, encoding="characters"))
    assert (task.vocab, task.max_length) == (3 + len(set("film \u00e9")), 4096)
    assert task.decode(task.test[0]) == "film \u00e9"
    assert task.test[3][-2:].tolist() == [1, 2], "q was seen once"
    as_bytes = load_task(DataConfig(task="text", root=tmp_path, encoding="bytes"))
    assert np.array_equal(as_bytes.val.labels, task.val.labels)
    assert [task.decode(task.val[i]) for i in range(4)] == [
        as_bytes.decode(as_bytes.val[i]).replace("q", "\ufffd") for i in range(4)
    ]


def test_the_real_reviews_as_characters(tmp_path):
    """134 symbols with padding, unknown and end: S4 reports about 135."""
    (tmp_path / "text").symlink_to(shared("imdb"))
    task = load_task(DataConfig(task="text", root=tmp_path, encoding="characters"))
    assert (task.vocab, len(task.train), len(task.test)) == (134, 22_500, 25_000)
    assert "published data have" not in task.note
    batch = task.test.batch(np.arange(64))
    assert int(batch.inputs.max()) < 134
    assert batch.inputs.shape[1] <= 4096


def test_pixels_as_tokens(tmp_path):
    write_image(tmp_path)
    task = load_task(DataConfig(task="image", root=tmp_path, encoding="tokens"))
    assert (task.inputs, task.vocab, task.channels) == ("tokens", 256, 0)
    batch = FixedTokens(np.array([[0, 255], [7, 8]], dtype=np.uint8), np.array([4, 5])).batch(np.array([1, 0]))
    assert batch.inputs.tolist() == [[7, 8], [0, 255]]
    assert batch.inputs.dtype == torch.int64
    assert batch.labels.tolist() == [5, 4]
    assert "where the published data have 6,278,124,545" in task.note


def test_channels_are_standardised_each_by_its_own():
    raw = np.array([[[0, 10], [4, 30]]], dtype=np.uint8)
    batch = FixedSplit(raw, np.array([0]), (2.0, 20.0), (2.0, 10.0)).batch(np.array([0]))
    assert batch.inputs.tolist() == [[[-1, -1], [1, 1]]]


def test_images_in_colour(tmp_path):
    (tmp_path / "cifar10").mkdir()
    generator = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        records = generator.integers(0, 256, (10_000, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(tmp_path / "cifar10" / f"{name}.bin")
    task = load_task(DataConfig(task="image-colour", root=tmp_path))
    assert [len(task.train), len(task.val), len(task.test)] == [45_000, 5_000, 10_000]
    assert (task.channels, task.max_length) == (3, 1024)
    assert "not those of CIFAR-10" in task.note
    batch = task.test.batch(np.array([7]))
    wanted = (records[7, 1:].reshape(3, 1024).T - np.array(MEANS)) / np.array(DEVIATIONS)
    np.testing.assert_allclose(batch.inputs[0].numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("name", READERS)
def test_a_setting_that_a_task_does_not_take_is_refused(name, tmp_path):
    reader = READERS[name]
    for encoding in ("bytes", "characters", "real", "tokens"):
        if encoding not in reader.encodings:
            with pytest.raises(ValueError, match=f"--data.encoding is {encoding}: {name} (takes|has one form)"):
                load_task(DataConfig(task=name, root=tmp_path, encoding=encoding))
    with pytest.raises(ValueError, match=f"--data.rate is 44100: {name} (takes|has one form)"):
        load_task(DataConfig(task=name, root=tmp_path, rate=44_100))
    if not reader.cuts:
        with pytest.raises(ValueError, match=f"all sequences of {name} have the same length"):
            load_task(DataConfig(task=name, root=tmp_path, max_length=10))
