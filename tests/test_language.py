"""Language models' tasks: bytes and tokens, windows and packed documents, what their losses mean, runs on them."""

import json
import math
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from chela.config import DataConfig, ModelConfig
from chela.data import PackedSplit, StreamSplit, corpora, language
from chela.evaluation.datasets import describe_task
from chela.presets import preset
from chela.training.metrics import evaluate
from chela.training.stream import Source
from cli_kit import SMALL, chela, succeed  # pyrefly: ignore
from data_kit import load, load_task, write_documents, write_pg19  # pyrefly: ignore


def test_documents_a_line_packed_and_in_windows(tmp_path):
    write_documents(tmp_path)
    windows, packed = (load("bytes", tmp_path, max_length=128, packed=packed) for packed in (False, True))
    assert [type(task.train) for task in (windows, packed)] == [StreamSplit, PackedSplit]
    assert windows.train.text.documents == packed.train.text.documents == 40
    labels = [part.batch(np.arange(len(part))).labels for part in (windows.train, packed.train)]
    assert [(label >= 0).sum() for label in labels] == [windows.train.text.bytes - 1, windows.train.text.bytes - 40]
    assert packed.train.batch(np.array([0])).inputs.shape == (1, 128)


def test_bpe_is_trained_once_on_the_training_part(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    write_documents(tmp_path)
    said = []
    task = load_task(DataConfig(task="bytes", root=tmp_path, encoding="bpe", vocab=300), progress=said.append)
    assert task.vocab == 300
    assert len(task.train.tokens) < task.train.text.bytes / 2
    decoded = task.decode(task.val.tokens[0 : len(task.val.tokens)])
    assert decoded.startswith("The valid document 0 says that")
    assert len(decoded) == task.val.text.bytes == 2_344
    first = task.train.tokens[0 : task.train.tokens.ends[0]]
    assert first[-1] == 0  # the end of the document
    assert (first[:-1] > 0).all()
    (kept,) = (tmp_path / "prepared").glob("bytes-bpe-*/tokenizer.json")
    assert kept.read_text(encoding="utf-8") == task.tokenizer
    monkeypatch.setattr(language, "train_tokenizer", None)
    assert load("bytes", tmp_path, encoding="bpe", vocab=300).tokenizer == task.tokenizer


class Uniform(torch.nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.config = ModelConfig(kind="causal-lm", causal=True, vocab=vocab)

    def forward(self, inputs, mask, cu_seqlens=None):
        return torch.zeros(*inputs.shape, self.config.vocab)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ["bytes", "bpe"])
def test_bits_per_byte_and_words_follow_from_the_nats(encoding, packed, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    monkeypatch.setattr(corpora, "PG19", {"train": (1, 5), "valid": (1, 5), "test": (2, 50)})
    write_pg19(tmp_path)
    task = load("pg19", tmp_path, encoding=encoding, packed=packed, max_length=8)
    for examples in (0, 2):
        result = evaluate(
            Uniform(task.vocab),
            task.test,
            batch_size=2,
            device=torch.device("cpu"),
            kind="causal-lm",
            examples=examples,
        )
        if not examples:
            spans = zip([0, *task.test.tokens.ends[:-1]], task.test.tokens.ends, strict=True)
            firsts = [start + 1 for start, _ in spans] if packed else [1]
            ends = [*task.test.tokens.ends] if packed else [len(task.test.tokens)]
            predicted = np.concatenate([task.test.tokens[a:b] for a, b in zip(firsts, ends, strict=True)])
            size = len(task.decode(predicted))
            nats = len(predicted) * math.log(task.vocab)
            assert result["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-6)
            words = task.test.text.bytes / 50
            assert result["word_perplexity"] == pytest.approx(math.exp(nats / size * words), rel=1e-5)
        if encoding == "bytes":
            assert result["bits_per_byte"] == pytest.approx(8, rel=1e-6)


def test_settings_that_do_not_fit_are_refused(tmp_path):
    write_documents(tmp_path)
    with pytest.raises(ValueError, match=r"--data.vocab is 300: the size of a tokenizer, set --data.encoding bpe"):
        load("bytes", tmp_path, vocab=300)
    with pytest.raises(ValueError, match=r"--data.packed packs the documents .*: digits has none"):
        load("digits", tmp_path, packed=True)
    with pytest.raises(ValueError, match=r"data.vocab is 256, but all bytes and the end of a document take 257"):
        DataConfig(vocab=256)
    (tmp_path / "bytes" / "valid.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="the valid part of bytes has 1 tokens: at least 2 are needed"):
        load("bytes", tmp_path)


def test_prepared_tokens_that_were_damaged_are_named(tmp_path):
    write_documents(tmp_path)
    load("bytes", tmp_path)
    (shard,) = (tmp_path / "prepared").glob("bytes-test-bytes-*/00000.bin")
    shard.write_bytes(shard.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"00000\.bin was changed since it was written"):
        describe_task(DataConfig(task="bytes", root=tmp_path))
    shard.write_bytes(b"")
    with pytest.raises(ValueError, match=r"prepared data are damaged .* delete .* and they are made again"):
        load("bytes", tmp_path)


def test_a_description_counts_everything(tmp_path):
    write_documents(tmp_path)
    lines = describe_task(DataConfig(task="bytes", root=tmp_path)).splitlines()
    assert "  training: 2,344 bytes, 40 documents, 2,344 tokens (1.00 bytes each)" in lines
    assert "'The train document 0 says that the best of times was 0." in lines[-1]


def test_token_files_of_ones_own(tmp_path):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    write_documents(tmp_path)
    made = load("bytes", tmp_path, encoding="bpe", vocab=300)
    for part, split in zip(corpora.PARTS, (made.train, made.val, made.test), strict=True):
        shutil.copytree(split.tokens.folder, tmp_path / "tokens" / part)
    task = load("tokens", tmp_path, max_length=16)
    assert (task.vocab, task.max_length, task.tokenizer, task.train.text) == (300, 16, "", None)
    assert task.train.batch(np.array([0])).inputs.tolist() == [made.train.tokens[0:16].tolist()]
    (tmp_path / "tokens" / "tokenizer.json").write_text(made.tokenizer, encoding="utf-8")
    task = load("tokens", tmp_path, packed=True)
    assert (task.tokenizer, task.train.text.bytes) == (made.tokenizer, made.train.text.bytes)
    assert task.decode(task.train.tokens[0:9]).startswith("The train")
    shutil.rmtree(tmp_path / "tokens" / "test")
    other = load("bytes", tmp_path, encoding="bpe", vocab=310).test.tokens.folder
    shutil.copytree(other, tmp_path / "tokens" / "test")
    with pytest.raises(ValueError, match=r"test has a vocabulary of 310, but .*train one of 300"):
        load("tokens", tmp_path)


# a run on tokens


def test_a_run_on_tokens_keeps_its_tokenizer(tmp_path):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    write_documents(tmp_path)
    out = tmp_path / "run"
    words = ("--data.root", tmp_path, "--data.encoding", "bpe", "--data.vocab", 300, "--data.max-length", 32)
    command = ("train", "lm-tiny", *SMALL, *words, "--data.packed", "--model.vocab", 300, "--out", out)
    assert chela(*command, "--train.time-limit", "0.001s")[0] == 0
    stopped = shutil.copytree(out, tmp_path / "stopped")
    assert "bits per byte" in succeed(*command)
    assert (out / "tokenizer.json").is_file()
    assert "bits per byte" in succeed("eval", out)
    said = succeed("generate", out, "--prompt", "The train", "--max-new-tokens", 5)
    assert said.startswith("The train")
    # a training text that has changed since gives another tokenizer: nothing goes on with it
    rows = ({"text": f"Something else altogether, number {n}, is written here."} for n in range(40))
    (tmp_path / "bytes" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for again in (("eval", out), (*command[:-1], stopped)):
        code, _, err = chela(*again)
        assert code
        assert "the tokenizer of the data is not the one in" in err
    (out / "tokenizer.json").unlink()
    code, _, err = chela("generate", out, "--prompt", "The")
    assert code
    assert "tokenizer.json is missing, and bytes have 256" in err


def test_without_tokenizers_the_package_is_named(tmp_path, monkeypatch):
    write_documents(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"needs the package tokenizers: pip install 'chela\[data\]'"):
        load("bytes", tmp_path, encoding="bpe")
    assert not list((tmp_path / "prepared").iterdir())


def test_any_step_can_be_read_alone(tmp_path):
    write_documents(tmp_path)
    run = replace(preset("lm-tiny"), seed=3)
    run = replace(run, train=replace(run.train, batch_size=4))
    for packed in (False, True):
        data = DataConfig(task="bytes", root=tmp_path, max_length=64, packed=packed)
        in_order = Source(load_task(data), run)
        shares = [in_order.share(step) for step in range(12)]
        for step in (11, 0, 7):
            (part,), (again,) = shares[step].parts, Source(load_task(data), run).share(step).parts
            assert torch.equal(part.inputs, again.inputs)
            assert torch.equal(part.labels, again.labels)
        assert not torch.equal(shares[0].parts[0].inputs, shares[1].parts[0].inputs)
