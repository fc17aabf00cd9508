import hashlib
import json
import lzma
from importlib.resources import files

import numpy as np
import pytest
import torch

from chela.config import DataConfig
from chela.data import Batch, FixedSplit, RaggedSplit, StreamSplit, indices_at
from chela.data.cache import prepared
from chela.data.images import gray
from chela.data.task import entropy, majority
from data_kit import load_task, shared  # pyrefly: ignore


def ragged():
    sequences = [[5, 6, 7], [1], [2, 3], [9, 9, 9, 9]]
    tokens = np.concatenate([np.array(s, dtype=np.uint8) for s in sequences])
    return RaggedSplit(tokens, np.cumsum([len(s) for s in sequences]), np.array([0, 1, 0, 1]))


def test_every_example_once_an_epoch_in_an_order_of_its_own():
    n, batch = 10, 4
    stream = np.concatenate([indices_at(n, batch, step, seed=3) for step in range(10)])
    epochs = stream.reshape(4, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert not np.array_equal(stream, np.concatenate([indices_at(n, batch, step, seed=4) for step in range(10)]))


def test_a_batch_is_a_function_of_its_step_alone():
    drawn = [indices_at(7, 5, step, seed=1) for step in range(6)]
    assert np.array_equal(indices_at(7, 5, 4, seed=1), drawn[4])
    assert np.array_equal(indices_at(3, 10, 0, seed=1)[:3], indices_at(3, 3, 0, seed=1))  # a batch of several epochs


def test_ragged_batches_are_padded_on_the_right():
    batch = ragged().batch(np.array([1, 0]))
    assert batch.inputs.tolist() == [[1, 0, 0], [5, 6, 7]]
    assert batch.mask is not None
    assert batch.mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.labels.tolist() == [1, 0]
    assert ragged().batch(np.array([3])).mask is None
    assert ragged().lengths().tolist() == [3, 1, 2, 4]


def test_ragged_sequences_are_cut_and_shifted():
    split = ragged()
    cut = RaggedSplit(split.tokens, split.ends, split.labels, shift=1, limit=2)
    assert cut.batch(np.array([0, 1])).inputs.tolist() == [[6, 7], [2, 0]]
    assert cut.lengths().max() == 2


def test_streams_predict_the_next_token_and_nothing_past_the_end():
    split = StreamSplit(np.arange(8, dtype=np.uint8), window=3)
    assert len(split) == 3
    batch = split.batch(np.array([0, 2]))
    assert batch.inputs.tolist() == [[0, 1, 2], [6, 7, 0]]
    assert batch.labels.tolist() == [[1, 2, 3], [7, -100, -100]]
    everything = split.batch(np.arange(3)).labels
    assert everything[everything >= 0].tolist() == list(range(1, 8))
    assert len(StreamSplit(np.arange(7, dtype=np.uint8), window=3)) == 2


def test_fixed_splits_are_standardised():
    batch = FixedSplit(np.array([[0, 255], [10, 20]], dtype=np.uint8), np.array([1, 0]), 10.0, 5.0).batch(np.array([1]))
    assert batch.inputs.shape == (1, 2, 1)
    assert batch.inputs.flatten().tolist() == [0.0, 2.0]


def test_batches_move():
    batch = ragged().batch(np.array([0, 1]))
    assert batch.to("cpu", non_blocking=True).inputs is not None
    mask = batch.to("meta").mask
    assert mask is not None
    assert mask.device.type == "meta"
    assert batch.to("meta").second is None
    assert isinstance(batch, Batch)


def test_digits_are_the_published_scans_in_disjoint_balanced_parts():
    with files("chela.data").joinpath("digits.npz").open("rb") as file, np.load(file) as archive:
        images, labels = archive["images"], archive["labels"]
    assert images.shape == (1797, 64)
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    assert digest == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
    task = load_task(DataConfig())
    parts = [task.train, task.val, task.test]
    assert [len(part) for part in parts] == [1259, 179, 359]
    rows = np.concatenate([part.raw for part in parts])
    assert sorted(map(bytes, rows)) == sorted(map(bytes, images))
    known = {bytes(row) for row in task.train.raw}
    assert not any(bytes(row) in known for row in task.test.raw)
    for part, share in zip(parts, (0.7, 0.1, 0.2), strict=True):
        assert np.abs(np.bincount(part.labels) - share * np.bincount(labels)).max() <= 1
    assert task.baselines["majority class"] == pytest.approx(0.1, abs=0.01)
    assert task.chance_loss == pytest.approx(np.log(10), abs=1e-3)
    batch = task.train.batch(np.arange(len(task.train)))
    assert batch.inputs.mean().abs() < 1e-5
    assert batch.inputs.std() == pytest.approx(1, abs=1e-4)


def test_digits_equal_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    theirs = datasets.load_digits()
    with files("chela.data").joinpath("digits.npz").open("rb") as file, np.load(file) as archive:
        assert np.array_equal(archive["images"], theirs.data)
        assert np.array_equal(archive["labels"], theirs.target)


def test_the_split_of_digits_follows_the_data_seed():
    a, b, c = (load_task(DataConfig(seed=seed)).test.raw for seed in (0, 0, 1))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_baselines():
    assert majority(np.array([1, 1, 0]), np.array([1, 0, 0, 1])) == 0.5
    assert entropy(np.array([0, 1])) == pytest.approx(np.log(2))
    assert entropy(np.array([1, 1])) == 0


def test_the_cache_is_written_once_and_whole(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"a": np.arange(3), "b": np.ones((2, 2))}

    first = prepared(tmp_path, "x", {"k": 1}, make)
    again = prepared(tmp_path, "x", {"k": 1}, make)
    assert len(calls) == 1
    assert np.array_equal(first["a"], again["a"])
    prepared(tmp_path, "x", {"k": 2}, make)
    assert len(calls) == 2
    with pytest.raises(RuntimeError, match="stop"):
        prepared(tmp_path, "x", {"k": 3}, lambda: (_ for _ in ()).throw(RuntimeError("stop")))
    assert len(list((tmp_path / "prepared").iterdir())) == 2


def reviews(folder, wrapper):
    rows = [{"text": f"good film {i} ü", "label": 1} for i in range(30)] + [{"text": "bad", "label": 0}] * 30
    for name in ("train", "test"):
        wrapper(folder, name, rows)
    return folder


def as_jsonl(folder, name, rows):
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def as_xz(folder, name, rows):
    with lzma.open(folder / f"{name}.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, rows)))


def as_folders(folder, name, rows):
    for side in ("neg", "pos"):
        (folder / name / side).mkdir(parents=True)
    for number, row in enumerate(rows):
        (folder / name / ("pos" if row["label"] else "neg") / f"{number}_5.txt").write_text(
            row["text"], encoding="utf-8"
        )


def as_parquet(folder, name, rows):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")


@pytest.mark.parametrize("form", [as_jsonl, as_xz, as_folders, as_parquet])
def test_text_reads_every_published_form(form, tmp_path):
    (tmp_path / "text").mkdir()
    reviews(tmp_path / "text", form)
    task = load_task(DataConfig(task="text", root=tmp_path))
    assert [len(task.train), len(task.val), len(task.test)] == [54, 6, 60]
    assert (task.vocab, task.classes, task.max_length) == (257, 2, 4000)
    row = next(i for i in range(60) if task.test.labels[i] == 1)
    assert bytes((task.test[row] - 1).astype(np.uint8)).decode().startswith("good film")
    assert task.test[row].max() > 190  # the bytes of ü, plus one
    counted = sorted(part[i].tobytes() for part in (task.train, task.val) for i in range(len(part)))
    assert counted == sorted(task.test[i].tobytes() for i in range(60))
    assert load_task(DataConfig(task="text", root=tmp_path, max_length=4)).train.lengths().max() == 4


def test_bad_tables_are_named(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    tables = {"lacks the columns text": [{"text": "a"}], "row 2 has no text": [{"text": "a", "label": 0}, {"label": 1}]}
    for part, rows in tables.items():
        for name in ("train", "test"):
            parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        with pytest.raises(ValueError, match=rf"train\.parquet .*{part}"):
            load_task(DataConfig(task="text", root=tmp_path))
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"train\.parquet is damaged"):
        load_task(DataConfig(task="text", root=tmp_path))


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"text": "a", "label": 2}', "label 2"),
        ('{"text": "a"}', "line 1"),
        ("", "no reviews"),
        ('{"text": "a", "label": 1}', "holds 1 reviews: 10 at least"),
    ],
)
def test_bad_reviews_are_named(line, part, tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(line)
    with pytest.raises(ValueError, match=part):
        load_task(DataConfig(task="text", root=tmp_path))


def binary_images(folder):
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        records = generator.integers(0, 256, (10_000, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / f"{name}.bin")
    return records


def test_image_reads_the_binary_version(tmp_path):
    test = binary_images(tmp_path / "cifar-10-batches-bin")
    task = load_task(DataConfig(task="image", root=tmp_path))
    assert [len(task.train), len(task.val), len(task.test)] == [45_000, 5_000, 10_000]
    r, g, b = (test[7, 1 + 1024 * c].astype(float) for c in range(3))
    assert abs(float(task.test.raw[7, 0]) - (0.299 * r + 0.587 * g + 0.114 * b)) <= 1
    batch = task.test.batch(np.array([7]))
    assert batch.inputs.shape == (1, 1024, 1)
    assert batch.inputs[0, 0, 0] == pytest.approx((task.test.raw[7, 0] - 122.6) / 61.0, abs=1e-5)
    assert batch.labels[0] == test[7, 0]
    assert not set(map(bytes, task.val.raw[:50])) & set(map(bytes, task.train.raw))


def test_a_short_image_file_is_named(tmp_path):
    binary_images(tmp_path / "image")
    path = tmp_path / "image" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3\.bin has 30,729,999 bytes"):
        load_task(DataConfig(task="image", root=tmp_path))


def test_gray_is_pillows():
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    rgb = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    wanted = np.asarray(image.fromarray(rgb).convert("L")).ravel()
    assert np.array_equal(gray(rgb.reshape(-1, 3).T), wanted)


def test_bytes_reads_plain_and_packed_text(tmp_path):
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes" / "train.txt.xz").write_bytes(lzma.compress("abcdé".encode()))
    for part in ("valid", "test"):
        (tmp_path / "bytes" / f"{part}.txt").write_bytes(b"hello")
    task = load_task(DataConfig(task="bytes", root=tmp_path, max_length=4))
    assert (task.kind, task.vocab, task.max_length, len(task.train)) == ("causal-lm", 256, 4, 2)
    assert bytes(task.test.batch(np.array([0])).labels[0].tolist()) == b"ello"
    assert task.chance_loss == pytest.approx(np.log(256))


MISSING = ["text", "image", "bytes", "image-colour", "retrieval", "citations", "speech", "speech-35", "spoken-digits"]
MISSING += [
    "enwik8",
    "text8",
    "wikitext-2",
    "wikitext-2-raw",
    "wikitext-103",
    "wikitext-103-raw",
    "pg19",
    "novels",
    "tokens",
]


@pytest.mark.parametrize("name", MISSING)
def test_missing_data_say_what_and_where(name, tmp_path):
    with pytest.raises(ValueError, match=f"no data for {name}: put .* into {tmp_path}") as caught:
        load_task(DataConfig(task=name, root=tmp_path))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match=r"unknown task 'digit' .*'digits'"):
        load_task(DataConfig(task="digit"))


def test_damaged_archives_are_named(tmp_path):
    for name in ("train", "test"):
        whole = lzma.compress(b'{"text": "a", "label": 0}\n' * 1000)
        (tmp_path / f"{name}.jsonl.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"train\.jsonl\.xz is damaged"):
        load_task(DataConfig(task="text", root=tmp_path))


def test_the_real_reviews(tmp_path):
    (tmp_path / "text").symlink_to(shared("imdb"))
    task = load_task(DataConfig(task="text", root=tmp_path))
    assert [len(task.train), len(task.val), len(task.test)] == [22_500, 2_500, 25_000]
    assert int(task.test.ends[-1]) == 32_350_685
    assert np.bincount(task.test.labels).tolist() == [12_500, 12_500]
    batch = task.train.batch(np.arange(4))
    assert batch.inputs.max() <= 256
    assert batch.inputs.dtype == torch.int64


@pytest.mark.slow
def test_the_real_images(tmp_path):
    (tmp_path / "image").symlink_to(shared("cifar10_gray"))
    task = load_task(DataConfig(task="image", root=tmp_path))
    assert [len(task.train), len(task.val), len(task.test)] == [45_000, 5_000, 10_000]
    assert np.bincount(task.test.labels).tolist() == [1000] * 10
    assert task.test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert "published data have" not in task.note, "the training pixels are exact"
    assert "9,000 test images are decoded JPEG" in task.note
    values = task.train.batch(np.arange(2000)).inputs
    assert values.mean().abs() < 0.05
    assert abs(float(values.std()) - 1) < 0.05
