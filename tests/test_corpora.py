"""Corpora of language models in their published forms: parts, counts, notes, and what is refused."""

import hashlib
import json
import lzma
import shutil
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest

from chela.data import corpora, novels
from data_kit import load, shared, write_pg19  # pyrefly: ignore


def text_of(split: Any) -> bytes:
    return bytes(split.tokens[0 : len(split.tokens)])


# enwik8, text8


@pytest.fixture
def hundred(monkeypatch):
    """A file of 200 bytes in the place of the published ones."""
    content = bytes(np.random.default_rng(0).integers(97, 123, 200, dtype=np.uint8))
    known = (200, hashlib.md5(content).hexdigest())
    monkeypatch.setattr(corpora, "HUNDRED", {"enwik8": known, "text8": known})
    return content


@pytest.mark.parametrize("name", ["enwik8", "text8"])
@pytest.mark.parametrize("form", ["file", "zip", "root"])
def test_one_hundred_million_bytes_are_cut_90_5_5(name, form, hundred, tmp_path):
    folder = tmp_path if form == "root" else tmp_path / name
    folder.mkdir(exist_ok=True)
    if form == "zip":
        with ZipFile(folder / f"{name}.zip", "w") as file:
            file.writestr(name, hundred)
    else:
        (folder / name).write_bytes(hundred)
    task = load(name, tmp_path, max_length=16)
    assert [text_of(part) for part in (task.train, task.val, task.test)] == [
        hundred[:180],
        hundred[180:190],
        hundred[190:],
    ]
    assert (task.kind, task.vocab, task.max_length, len(task.train)) == ("causal-lm", 256, 16, 12)
    assert task.train.text.words == 0  # bits per byte are this corpus's measure
    assert "5 million for validation" in task.note


def test_another_file_is_not_called_enwik8(hundred, tmp_path):
    (tmp_path / "enwik8").write_bytes(hundred[:-1])
    with pytest.raises(ValueError, match="enwik8 has 199 bytes, but enwik8 has 200: it was cut off"):
        load("enwik8", tmp_path)
    (tmp_path / "enwik8").write_bytes(hundred[::-1])
    with pytest.raises(ValueError, match="is not enwik8: its MD5 is not"):
        load("enwik8", tmp_path)
    assert not list((tmp_path / "prepared").iterdir())
    (tmp_path / "text8.zip").write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match=r"text8\.zip is damaged"):
        load("text8", tmp_path)
    with ZipFile(tmp_path / "text8.zip", "w") as file:
        file.writestr("readme", b"")
    with pytest.raises(ValueError, match=r"text8\.zip holds no text8"):
        load("text8", tmp_path)


def test_the_published_sizes():
    assert {name: size for name, (size, _) in corpora.HUNDRED.items()} == {"enwik8": 10**8, "text8": 10**8}


# WikiText

ARTICLES = " \n = One = \n \n Some words , <unk> . \n \n = = Part = = \n \n More . \n \n = 2 = \n \n a = b = \n"


@pytest.mark.parametrize("name", ["wikitext-2", "wikitext-103", "wikitext-2-raw", "wikitext-103-raw"])
def test_wikitext_in_articles(name, tmp_path):
    end = "raw" if name.endswith("raw") else "tokens"
    (tmp_path / name).mkdir()
    for part in corpora.PARTS[1:]:
        (tmp_path / name / f"wiki.{part}.{end}").write_text(ARTICLES)
    with ZipFile(tmp_path / name / f"{name}-v1.zip", "w") as file:
        file.writestr(f"{name}/wiki.train.{end}", ARTICLES * 2)
    task = load(name, tmp_path)
    assert text_of(task.train) == 2 * ARTICLES.encode()
    assert [part.text.documents for part in (task.train, task.val)] == [4, 2]
    assert text_of(task.val)[: task.val.tokens.ends[0]].endswith(b"More . \n")
    assert task.val.text.words == 22 + 12  # between blanks, and one at the end of each line
    published = "103,227,021" if "103" in name else "2,088,628"
    assert f"words in the train part, where the published data have {published}" in task.note
    assert ("<unk>" in task.note) == (end == "tokens")


def test_the_real_wikitext(tmp_path):
    source = shared("wikitext2_eval")
    (tmp_path / "wikitext-2").mkdir()
    for part in ("valid", "test"):
        content = lzma.decompress((source / f"{part}.txt.xz").read_bytes())
        (tmp_path / "wikitext-2" / f"wiki.{part}.tokens").write_bytes(content)
    shutil.copy(tmp_path / "wikitext-2" / "wiki.valid.tokens", tmp_path / "wikitext-2" / "wiki.train.tokens")
    task = load("wikitext-2", tmp_path)
    assert (task.val.text.words, task.test.text.words) == (217_646, 245_569)
    assert (task.val.text.documents, task.test.text.documents) == (60, 60)
    assert task.note == (
        "the published parts, rare words replaced by <unk>; 217,646 words in the train part, "
        "where the published data have 2,088,628"
    )


# PG-19


def test_pg19_reads_books_and_counts_words_as_published(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PG19", {"train": (3, 10), "valid": (2, 77), "test": (2, 88)})
    write_pg19(tmp_path)
    task = load("pg19", tmp_path)
    assert text_of(task.val) == b"Book 0 of validation.\r\nBook 1 of validation.\r\n"
    assert task.val.tokens.ends.tolist() == [23, 46]
    assert (task.val.text.words, task.test.text.words) == (77, 88)  # all books: the published number of words
    assert task.train.text.words == 8  # not all: counted
    assert task.note == "the published parts; 2 train documents, where the published data have 3"


# novels


def test_novels_are_those_of_the_checksums(tmp_path, monkeypatch):
    folder = tmp_path / "english_novels"
    folder.mkdir()
    texts = {"train": [b"One. ", b"Two. "], "valid": [b"Three. "], "test": [b"Four. "]}
    books = []
    for part, found in texts.items():
        (folder / f"{part}.txt.xz").write_bytes(lzma.compress(b"".join(found)))
        ends = np.cumsum([len(text) for text in found]).tolist()
        books += [{"split": part, "file": f"{end}.txt", "start": 0, "end": end} for end in ends]
    (folder / "books.json").write_text(json.dumps(books))
    with pytest.raises(ValueError, match=r"does not hold the train books .*100_english_novels"):
        load("novels", tmp_path)
    sums = {part: hashlib.sha256(b"".join(found)).hexdigest() for part, found in texts.items()}
    monkeypatch.setattr(novels, "SHA256", sums)
    task = load("novels", tmp_path)
    assert task.train.tokens.ends.tolist() == [5, 10]
    assert "its own corpus" in task.note
    (folder / "train.txt.xz").write_bytes(lzma.compress(b"One. Two"))
    with pytest.raises(ValueError, match=r"train\.txt\.xz has 8 bytes, but books\.json another number"):
        load("novels", tmp_path)
    (folder / "books.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"books\.json is damaged"):
        load("novels", tmp_path)


def test_novels_from_the_published_files(tmp_path, monkeypatch):
    folder = tmp_path / "novels" / "corpus"
    folder.mkdir(parents=True)
    names = [f"Author_Title{n}_{1880 + n}.txt" for n in range(45)] + ["Forster_View_1908.txt"]
    for name in names:
        (folder / name).write_bytes(b"\xef\xbb\xbf" + name.encode() + b"\r\nof old\rend\n")
    order = sorted((n for n in names if int(n[-8:-4]) <= 1919), key=lambda n: hashlib.sha256(n.encode()).hexdigest())
    kept = {
        part: sorted(n for n in found if "Forster" not in n)
        for part, found in {"train": order[10:], "valid": order[5:10], "test": order[:5]}.items()
    }
    wanted = {part: b"".join(n.encode() + b"\nof old\nend\n" for n in found) for part, found in kept.items()}
    sums = {part: hashlib.sha256(text).hexdigest() for part, text in wanted.items()}
    monkeypatch.setattr(novels, "SHA256", sums)
    task = load("novels", tmp_path)
    assert {p: text_of(s) for p, s in zip(corpora.PARTS, (task.train, task.val, task.test), strict=True)} == wanted
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(ValueError, match="0 novels up to 1919 were found, 89 are wanted"):
        load("novels", tmp_path)


def test_the_real_novels(tmp_path):
    (tmp_path / "novels").symlink_to(shared("english_novels"))
    task = load("novels", tmp_path, max_length=4096)
    parts = (task.train, task.val, task.test)
    assert [part.text.bytes for part in parts] == [60_345_493, 4_950_054, 3_368_620]
    assert [part.text.documents for part in parts] == [76, 5, 5]
    assert text_of(task.train)[:13] == b"CLARA VAUGHAN"
    batch = task.train.batch(np.array([0, 14_732]))
    assert batch.inputs.shape == (2, 4096)
    assert (batch.labels[1] >= 0).sum() == (60_345_493 - 1) % 4096
