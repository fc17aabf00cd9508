"""Updates as CUDA graphs, batches of like lengths, padding to few lengths."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from chela.data.buckets import Buckets
from chela.models import build
from chela.training import journal
from chela.training.metrics import forward, score
from chela.training.stream import Source, pad
from chela.training.update import GraphedUpdate, Learner, compile_blocks, uncompiled
from test_checkpoint import assert_same_run  # pyrefly: ignore
from training_kit import LENGTH, Words, make_run, make_task, run_tiny  # pyrefly: ignore


def test_buckets_see_every_example_once_an_epoch_in_batches_of_like_lengths():
    lengths = np.random.default_rng(0).integers(1, 1000, 960)
    order = Buckets(lengths, batch_size=16, seed=3, pool=10)
    batches = [order.at(step) for step in range(60)]
    assert sorted(np.concatenate(batches)) == list(range(960))
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    assert spread < 1000 / 10  # ten batches cut the range of lengths in ten
    assert not np.array_equal(np.sort(batches[0]), np.sort(order.at(60)))  # another epoch, other batches


def test_buckets_are_a_pure_function_of_seed_and_step():
    lengths = np.random.default_rng(0).integers(1, 1000, 100)
    order = Buckets(lengths, 8, 0, 5)
    steps = [7, 0, 33, 12, 7]
    first = [order.at(step) for step in steps]
    for step, batch in zip(steps, first, strict=True):
        assert np.array_equal(batch, Buckets(lengths, 8, 0, 5).at(step))
    assert not np.array_equal(first[0], Buckets(lengths, 8, 1, 5).at(7))


@pytest.mark.parametrize("kind", ["classifier", "two-tower", "causal-lm"])
def test_padding_to_a_multiple_changes_no_loss(tmp_path, kind):
    model = {"kind": kind, "causal": kind == "causal-lm", "classes": 2 if kind == "two-tower" else 3, "dropout": 0.0}
    run = make_run(tmp_path, model=model)
    batch = make_task(kind).train.batch(np.arange(5))
    padded = pad(batch, 7, 0)
    assert padded.inputs.shape[1] % 7 == 0
    assert padded.inputs.shape[1] > batch.inputs.shape[1]
    network = build(replace(run.model, kernel_length=32)).double()
    with torch.no_grad():
        loss, hits = score(forward(network, batch), batch.labels)
        padded_loss, padded_hits = score(forward(network, padded), padded.labels)
    torch.testing.assert_close(padded_loss, loss, rtol=1e-10, atol=0)
    assert hits == padded_hits


def test_padding_stops_at_the_longest_sequence_the_model_takes():
    batch = make_task().train.batch(np.arange(50))
    assert batch.inputs.shape[1] == LENGTH
    assert pad(batch, 12, LENGTH).inputs.shape[1] == LENGTH
    assert pad(batch, 12, 0).inputs.shape[1] == 24
    assert pad(batch, 1, 0) is batch


def test_a_source_buckets_where_the_split_knows_its_lengths(tmp_path):
    task = make_task()
    plain = Source(task, make_run(tmp_path)).share(0)
    lengths = (task.train.tokens > 0).sum(1)  # pyrefly: ignore

    class Ragged(Words):
        def lengths(self) -> np.ndarray:
            return lengths

    ragged = replace(task, train=Ragged(task.train.tokens, task.train.labels))  # pyrefly: ignore
    run = make_run(tmp_path, bucket_batches=6, pad_multiple=4)
    longest = []
    for step in range(6):
        share = Source(ragged, run).share(step)
        assert share.parts[0].inputs.shape[1] % 4 == 0
        longest.append(share.parts[0].inputs.shape[1])
    assert len(set(longest)) > 1
    assert share.targets == plain.targets


@pytest.mark.parametrize("kind", ["classifier", "causal-lm"])
def test_compiled_blocks_give_the_same_loss_and_gradients_at_every_length(tmp_path, kind):
    run = make_run(tmp_path, model={"kind": kind, "causal": kind == "causal-lm", "dropout": 0.0})
    network = build(run.model)
    for block in network.backbone.blocks:  # pyrefly: ignore
        block.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 9, 14):
        batch = make_task(kind).train.batch(np.arange(n))
        results = []
        for context in (torch.compiler.set_stance("default"), uncompiled(network)):
            with context:
                network.zero_grad()
                loss, _ = score(forward(network, batch), batch.labels)
                loss.backward()
                results.append((loss.detach(), [p.grad.clone() for p in network.parameters()]))  # pyrefly: ignore
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_models_compiled_one_after_another_do_not_add_up_to_the_limit(tmp_path, monkeypatch):
    compile_part = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda part, **options: compile_part(part, backend="eager", **options)
    )
    with torch._dynamo.config.patch(recompile_limit=1):
        for width in (16, 24):
            network = build(make_run(tmp_path, model={"d_model": width}).model)
            compile_blocks(network)
            forward(network, make_task().train.batch(np.arange(4)))


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_updates_give_the_numbers_of_plain_ones(tmp_path, dtype):
    """Same loss curve: to rounding in float32, within the noise of bfloat16 otherwise."""
    curves = []
    for name, compiled in (("plain", False), ("recorded", True)):
        run = make_run(
            tmp_path / name, model={"dropout": 0.0}, steps=200, log_every=10, eval_every=100, save_every=100,
            device="cuda", dtype=dtype, compile=compiled, pad_multiple=4,
        )  # fmt: skip
        run_tiny(run)
        curves.append([e["loss"] for e in journal.read(run.folder / "metrics.jsonl") if e["kind"] == "train"])
    assert len(curves[0]) == len(curves[1]) == 20
    assert curves[0][-1] < 0.8 * curves[0][0]
    assert np.allclose(curves[0], curves[1], rtol=1e-3 if dtype == "float32" else 5e-2)


@gpu
def test_a_recorded_run_stopped_anywhere_ends_bit_equal(tmp_path):
    model = {"token_dropout": 0.2}
    settings = {"model": model, "device": "cuda", "pad_multiple": 4, "steps": 12, "save_every": 4}
    whole = make_run(tmp_path / "whole", **settings)
    run_tiny(whole)
    pieces = make_run(tmp_path / "pieces", **settings)
    for _ in range(20):
        result, _ = run_tiny(replace(pieces, train=replace(pieces.train, time_limit="0.001s")))
        if result.status == "done":
            break
    assert result.status == "done"
    assert_same_run(whole.folder, pieces.folder)


@pytest.mark.parametrize("model", [{}, {"prenorm": False}, {"kind": "causal-lm", "causal": True}])
def test_what_follows_the_blocks_is_compiled_too(tmp_path, model):
    network = build(make_run(tmp_path, model=model).model)
    names = set(network.state_dict())
    compile_blocks(network)
    parts = [*network.backbone.blocks, network.backbone.last_norm, getattr(network, "pooling", None)]
    assert all(part is None or part._compiled_call_impl is not None for part in parts)
    assert (network.backbone.last_norm is None) == (model == {"prenorm": False})
    assert set(network.state_dict()) == names


@gpu
def test_a_recording_takes_no_step(tmp_path):
    """What is run while recording is undone: weights, averages, statistics and sums are untouched."""
    from chela.training.guard import Guard
    from chela.training.optim import make_optimizer

    run = make_run(tmp_path, model={"norm": "batch"}, device="cuda")
    device = torch.device("cuda")
    network = build(run.model).to(device)
    compile_blocks(network)
    optimizer, sums = make_optimizer(network, run.optim), torch.zeros(3, dtype=torch.float64, device=device)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    update = GraphedUpdate(Learner(network, optimizer, Guard(device), sums, run, torch.float32))
    part = Source(make_task(), run).share(0).parts[0]
    update._record(part)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not sums.any()
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())


@gpu
def test_a_recorded_step_that_is_not_finite_changes_no_weight_and_is_explained(tmp_path):
    run = make_run(tmp_path, optim={"lr": 1e30, "clip": 0.0}, device="cuda", dtype="float32", steps=20, log_every=1)
    with pytest.raises(ValueError, match=r"infinite or NaN at step \d+, (first )?in "):
        run_tiny(run)
