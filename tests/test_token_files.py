"""Sharded token files: what is written comes back, and what was cut, changed or mislabelled is refused by name."""

import json

import numpy as np
import pytest

from chela.data import token_files
from chela.data.token_files import ENDS, HEADER, TokenFiles, TokenWriter

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 0]]
FLAT = np.concatenate(DOCUMENTS)


def write(folder, documents=DOCUMENTS, vocab=300, shard_tokens=5):
    folder.mkdir()
    with TokenWriter(folder, vocab, shard_tokens) as writer:
        for document in documents:
            for token in np.array_split(np.array(document), 2):  # in pieces
                writer.add(token, size=len(token), words=1)
            writer.end()
    return folder


def change(folder, **values):
    header = json.loads((folder / HEADER).read_text())
    (folder / HEADER).write_text(json.dumps(header | values))


def test_every_span_comes_back_across_shards(tmp_path):
    tokens = TokenFiles(write(tmp_path / "t"))
    assert (len(tokens), tokens.vocab, tokens.bytes, tokens.words) == (13, 300, 13, 8)
    assert tokens.ends.tolist() == [3, 4, 11, 13]
    assert sorted(p.name for p in tokens.folder.iterdir()) == [f"{n:05d}.bin" for n in range(3)] + [ENDS, HEADER]
    for start in range(14):
        for stop in range(start, 16):
            assert tokens[start:stop].tolist() == FLAT[start:stop].tolist()
    tokens.verify()


def test_the_layout_is_as_documented(tmp_path):
    folder = write(tmp_path / "t", vocab=70_000)
    header = json.loads((folder / HEADER).read_text())
    assert (header["format"], header["version"], header["dtype"], header["documents"]) == (
        "chela-tokens",
        1,
        "uint32",
        4,
    )
    raw = b"".join((folder / shard["file"]).read_bytes() for shard in header["shards"])
    assert np.array_equal(np.frombuffer(raw, dtype="<u4"), FLAT)
    assert np.array_equal(np.frombuffer((folder / ENDS).read_bytes(), dtype="<i8"), [3, 4, 11, 13])


@pytest.mark.parametrize(("vocab", "kind"), [(256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_the_narrowest_type_that_holds_the_vocabulary(vocab, kind, tmp_path):
    folder = write(tmp_path / "t", [[0, vocab - 1]], vocab)
    assert json.loads((folder / HEADER).read_text())["dtype"] == kind
    assert TokenFiles(folder)[0:2].tolist() == [0, vocab - 1]


def test_documents_without_tokens_are_left_out(tmp_path):
    assert TokenFiles(write(tmp_path / "t", [[], [1, 2], [], []])).ends.tolist() == [2]
    assert len(TokenFiles(write(tmp_path / "empty", []))) == 0


@pytest.mark.parametrize("token", [300, -1])
def test_no_token_outside_the_vocabulary_is_written(token, tmp_path):
    with pytest.raises(ValueError, match=f"token {token} is outside the vocabulary 0..299"):
        write(tmp_path / "t", [[1, token]])
    with pytest.raises(ValueError, match="holds no token files"):
        TokenFiles(tmp_path / "t")  # the header is written last


def test_what_was_cut_off_is_named(tmp_path):
    folder = write(tmp_path / "t")
    for name in ("00001.bin", ENDS):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=rf"{name} has \d+ bytes, but .* it was cut off"):
            TokenFiles(folder)
        (folder / name).write_bytes(whole)
    (folder / "00002.bin").unlink()
    with pytest.raises(ValueError, match=r"00002\.bin is missing"):
        TokenFiles(folder)


HEADERS = {
    "wrong type": ({"dtype": "uint32"}, r"00000\.bin has 10 bytes, .* has the wrong type"),
    "narrow type": ({"dtype": "uint8"}, r"a vocabulary of 300, which does not fit uint8"),
    "no type": ({"dtype": "float32"}, "dtype 'float32', wanted uint8, uint16 or uint32"),
    "other format": ({"format": "npy"}, "has format npy 1, wanted chela-tokens 1"),
    "later version": ({"version": 2}, "has format chela-tokens 2"),
    "count": ({"tokens": 12}, "counts 12 tokens, but its shards 13"),
    "no shards": ({"shards": None}, "is damaged"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_does_not_fit_is_refused(name, tmp_path):
    folder, (values, message) = write(tmp_path / "t"), HEADERS[name]
    change(folder, **values)
    with pytest.raises(ValueError, match=message):
        TokenFiles(folder)


def test_a_header_that_is_none_is_refused(tmp_path):
    folder = write(tmp_path / "t")
    for content in ("{", "[]", "{}"):
        (folder / HEADER).write_text(content)
        with pytest.raises(ValueError, match=r"tokens\.json is damaged, or no header"):
            TokenFiles(folder)


def test_ends_that_do_not_ascend_are_refused(tmp_path):
    folder = write(tmp_path / "t")
    for ends in ([4, 3, 11, 13], [3, 3, 11, 13], [3, 4, 11, 12]):
        (folder / ENDS).write_bytes(np.array(ends, dtype="<i8").tobytes())
        with pytest.raises(ValueError, match="must ascend to 13"):
            TokenFiles(folder)


def test_a_token_outside_the_vocabulary_is_found_when_it_is_read(tmp_path):
    folder = write(tmp_path / "t")
    change(folder, vocab=290)
    raw = np.fromfile(folder / "00001.bin", dtype="<u2")
    raw[2] = 295
    raw.tofile(folder / "00001.bin")
    tokens = TokenFiles(folder)
    assert tokens[0:7].tolist() == FLAT[:7].tolist()
    with pytest.raises(ValueError, match=r"token 295 is outside the vocabulary 0\.\.289"):
        tokens[5:9]


@pytest.mark.parametrize("name", ["00001.bin", ENDS])
def test_a_changed_file_is_found_by_its_checksum(name, tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "BLOCK", 2)
    folder = write(tmp_path / "t")
    raw = bytearray((folder / name).read_bytes())
    raw[0] ^= 1
    (folder / name).write_bytes(raw)
    with pytest.raises(ValueError, match=f"{name} was changed since it was written"):
        TokenFiles(folder).verify()
