"""Packed documents: all of them once, no target across their ends, and the numbers of each trained alone."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chela.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from chela.data import Batch, PackedSplit
from chela.data.packed import fill_rows
from chela.models import build
from chela.training.metrics import loss_and_hits
from chela.training.stream import pad

LENGTHS = [3, 1, 9, 2, 5, 4, 20, 6, 1, 7]
ENDS = np.cumsum(LENGTHS)
TOKENS = np.random.default_rng(0).integers(0, 11, ENDS[-1]).astype(np.uint16)


def documents(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Inputs and labels of every document that has a target."""
    assert batch.cu_seqlens is not None
    cuts = batch.cu_seqlens.tolist()
    found = []
    for start, stop in pairwise(cuts):
        inputs, labels = batch.inputs[0, start:stop].tolist(), batch.labels[0, start:stop].tolist()
        if any(label >= 0 for label in labels):
            found.append((inputs, labels))
    return found


def expected(room: int) -> list[tuple[list[int], list[int]]]:
    """The documents one by one, the long ones in pieces of `room` that go on predicting."""
    wanted = []
    for start, stop in zip([0, *ENDS[:-1]], ENDS, strict=True):
        for begin in range(start, stop, room):
            tokens = TOKENS[begin : min(begin + room, stop)].tolist()
            labels = TOKENS[begin + 1 : min(begin + room + 1, stop)].tolist()
            if labels:
                wanted.append((tokens, labels + [-100] * (len(tokens) - len(labels))))
    return wanted


@pytest.mark.parametrize("room", [2, 8, 9, 16, 64])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_document_comes_once_and_whole(room, rows):
    split, found = PackedSplit(TOKENS, ENDS, room), []
    for start in range(0, len(split), rows):
        batch = split.batch(np.arange(start, min(start + rows, len(split))))
        length = room * min(rows, len(split) - start)
        assert batch.inputs.shape == batch.labels.shape == (1, length)
        assert batch.cu_seqlens is not None
        assert batch.cu_seqlens.dtype == torch.int32
        assert (batch.cu_seqlens[0], batch.cu_seqlens[-1]) == (0, length)
        assert (batch.cu_seqlens.diff() >= 0).all()
        found += documents(batch)
    assert sorted(found) == sorted(expected(room))


def test_few_shapes_come_up_whatever_the_documents():
    split = PackedSplit(TOKENS, ENDS, 16)
    sizes = {len(split.batch(np.array([row])).cu_seqlens) for row in range(len(split))}  # pyrefly: ignore
    assert sizes <= {3, 5, 9}


def test_a_batch_is_a_function_of_its_indices():
    once, again = (PackedSplit(TOKENS, ENDS, 8).batch(np.array([2, 0])) for _ in range(2))
    assert torch.equal(once.inputs, again.inputs)
    assert torch.equal(once.labels, again.labels)


@given(st.lists(st.integers(1, 12), max_size=60))
def test_rows_hold_every_piece_once_and_few_stand_half_empty(sizes):
    rows = fill_rows(np.array(sizes, dtype=np.int64), 12)
    assert sorted(piece for row in rows for piece in row) == list(range(len(sizes)))
    filled = [sum(sizes[piece] for piece in row) for row in rows]
    assert all(total <= 12 for total in filled)
    assert sum(2 * total <= 12 for total in filled) <= 1  # two half-empty rows would have been one


MODELS: dict[str, dict[str, Any]] = {
    "chela": {"kernel_length": 16, "heads": 2},
    "chela, decay": {"kernel_length": 16, "heads": 2, "decay": True},
    "chela, longer kernel": {"kernel_length": 64, "kernel": "multiscale", "taps_per_octave": 4},
    "transformer": {"mixer": "transformer", "heads": 2},
}


@pytest.mark.parametrize("name", MODELS)
def test_packed_training_equals_training_on_each_document_alone(name):
    torch.manual_seed(0)
    shape: Any = {"layers": 2, "d_model": 8, "d_ff": 16, "d_key": 4, "d_value": 8} | MODELS[name]
    model = build(ModelConfig(kind="causal-lm", causal=True, vocab=11, **shape)).double()
    split = PackedSplit(TOKENS, ENDS, 24)
    batch = split.batch(np.arange(len(split)))

    def gradients(one: Batch) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss, _, _ = loss_and_hits(model, one)
        loss.backward()
        return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    alone = [gradients(Batch(torch.tensor([tokens]), torch.tensor([labels]))) for tokens, labels in expected(24)]
    loss, slopes = gradients(batch)
    wanted = sum(each for each, _ in alone)
    assert loss == pytest.approx(wanted, rel=1e-13)
    assert len(slopes) > 10
    for key, slope in slopes.items():
        parts = torch.stack([each[key] for _, each in alone])
        kept = torch.float32 if key.endswith("decay_logit") else torch.float64  # a layer computes its decay in float32
        band = 100 * torch.finfo(kept).eps * parts.abs().sum(0).max().item()
        torch.testing.assert_close(slope, parts.sum(0), rtol=0, atol=band, msg=lambda text, key=key: f"{key}: {text}")
    # and the boundaries matter: one long document is something else
    assert gradients(Batch(batch.inputs, batch.labels))[0] != pytest.approx(wanted, rel=1e-4)


def test_packed_rows_are_not_padded_and_move_whole():
    batch = PackedSplit(TOKENS, ENDS, 8).batch(np.array([0]))
    assert pad(batch, 64, 0) is batch
    moved = batch.to("meta")
    assert moved.cu_seqlens is not None
    assert moved.cu_seqlens.device.type == "meta"


def test_windows_cannot_warm_up_where_there_are_none():
    with pytest.raises(ValueError, match=r"train\.length_warmup cuts windows, and data\.packed has none"):
        RunConfig(data=DataConfig(packed=True), train=TrainConfig(length_warmup=10))
