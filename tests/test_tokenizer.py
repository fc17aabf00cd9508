"""Bytes and a byte-level BPE: any bytes come back, whatever the tokenizer, and pieces of a text are the text's."""

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from hypothesis import given
from hypothesis import strategies as st

from chela.data import tokenizer
from chela.data.tokenizer import END, ByteCoder, Tokenizer, cut_between_words, load_coder, train_tokenizer

TEXT = (b"It was the best of times, it was the worst of times; the age of wisdom. " * 40) + "Ä été 12.\n".encode() * 9
TRAINED = train_tokenizer([TEXT], 290)
CODERS = {"bytes": ByteCoder(), "bpe": Tokenizer(TRAINED)}


def decode(coder, tokens):
    return b"".join(coder.pieces[token] for token in tokens)


@pytest.mark.parametrize("name", CODERS)
@given(text=st.one_of(st.binary(max_size=80), st.text(max_size=40).map(lambda t: t.encode(errors="replace"))))
def test_any_bytes_come_back(name, text):
    coder = CODERS[name]
    assert decode(coder, coder.encode(text)) == text


def test_training_gives_the_same_twice_and_all_bytes_are_there():
    assert train_tokenizer([TEXT], 290) == TRAINED
    coder = CODERS["bpe"]
    assert (coder.vocab, coder.end, coder.pieces[0]) == (290, 0, b"")
    assert {piece for piece in coder.pieces if len(piece) == 1} == {bytes([value]) for value in range(256)}
    assert len(coder.encode(TEXT)) < len(TEXT) / 3
    assert Tokenizer(train_tokenizer([b"ab ab"], 290)).vocab < 270  # fewer pairs, fewer symbols


def test_a_text_cannot_end_its_document():
    coder = CODERS["bpe"]
    tokens = coder.encode(b"the " + END.encode() + b" of")
    assert coder.end not in tokens
    assert decode(coder, tokens) == b"the " + END.encode() + b" of"


def test_pieces_have_the_tokens_of_the_whole(monkeypatch):
    pieces = list(cut_between_words(TEXT, 100))
    assert len(pieces) > 20
    assert b"".join(pieces) == TEXT
    whole = CODERS["bpe"].encode(TEXT)
    assert np.array_equal(np.concatenate([CODERS["bpe"].encode(piece) for piece in pieces]), whole)
    monkeypatch.setattr(tokenizer, "TOGETHER", 2)
    assert np.array_equal(CODERS["bpe"].encode(TEXT), whole)
    assert list(cut_between_words(b"x" * 500, 100)) == [b"x" * 500]


def test_bytes_that_are_no_utf_8_are_tokens_of_their_own():
    coder = CODERS["bpe"]
    tokens = coder.encode(b"the \xff\xfe\xe2\x82 best")
    assert [coder.pieces[t] for t in tokens if coder.pieces[t][0] > 127] == [b"\xff", b"\xfe", b"\xe2", b"\x82"]


def test_a_run_knows_its_tokens(tmp_path):
    assert isinstance(load_coder(tmp_path, 256), ByteCoder)
    with pytest.raises(ValueError, match=r"has 290 symbols, but .*tokenizer\.json is missing"):
        load_coder(tmp_path, 290)
    (tmp_path / "tokenizer.json").write_text(TRAINED, encoding="utf-8")
    assert load_coder(tmp_path, 290).vocab == 290
    with pytest.raises(ValueError, match=r"has 256 symbols, but .*tokenizer\.json has 290"):
        load_coder(tmp_path, 256)
    (tmp_path / "tokenizer.json").write_text(TRAINED[:1000])
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        load_coder(tmp_path, 290)


def test_a_tokenizer_of_another_kind_is_refused():
    other = TRAINED.replace('"Ġ', '"▁')
    with pytest.raises(ValueError, match="no byte-level BPE"):
        Tokenizer(other)
