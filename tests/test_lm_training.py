"""What training a language model adds: windows that grow, states handed on, blocks computed again, no logits."""

from dataclasses import replace
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from chela.config import TrainConfig
from chela.data import Batch, StreamSplit, Task, consecutive_at
from chela.models import CausalLM, build, chunked_loss
from chela.training import checkpoint, journal
from chela.training.carry import Carried
from chela.training.checkpoint import put_back
from chela.training.metrics import evaluate, forward, loss_and_hits, score
from chela.training.optim import make_optimizer
from chela.training.step import Objective, compute_gradients
from chela.training.stream import Source
from chela.training.update import uncompiled
from chela.training.warmup import cut, pieces_at
from test_checkpoint import assert_same_run  # pyrefly: ignore
from test_chunked_loss import Watch, saved_bytes  # pyrefly: ignore
from training_kit import VOCAB, make_run, run_tiny  # pyrefly: ignore

WINDOW = 32
CPU = torch.device("cpu")
LM = {"kind": "causal-lm", "causal": True, "kernel_length": 24, "decay": True}


def stream_task(windows: int = 40, window: int = WINDOW) -> Task:
    """A stream whose next token is mostly a function of the last two."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB, windows * window + 1)
    for i in range(2, len(tokens)):
        if rng.random() < 0.8:
            tokens[i] = 1 + (tokens[i - 1] + 2 * tokens[i - 2]) % (VOCAB - 1)
    split = StreamSplit(tokens, window)
    return Task(
        name="stream", kind="causal-lm", train=split, val=split, test=split, inputs="tokens", vocab=VOCAB,
        max_length=window, chance_loss=float(np.log(VOCAB)),
    )  # fmt: skip


def make_model(run, dtype=torch.float64) -> CausalLM:
    torch.manual_seed(0)
    model = build(run.model).to(dtype)
    assert isinstance(model, CausalLM)
    return model


def in_pieces(run, task) -> None:
    """Train with a stop after nearly every step."""
    for _ in range(40):
        result, _ = run_tiny(replace(run, train=replace(run.train, time_limit="0.001s")), task)
        if result.status == "done":
            return
    raise AssertionError("it never ended")


# The loss


def test_no_logits_of_all_positions_are_made_in_training_or_evaluation(tmp_path):
    run, task = make_run(tmp_path, model={**LM, "dropout": 0.0}), stream_task()
    model, share = make_model(run, torch.float32), Source(task, run).share(0)
    batch = share.parts[0]
    with patch.object(chunked_loss.chunked_cross_entropy, "__kwdefaults__", {"logits_at_once": 5 * VOCAB}):
        with Watch() as watch:
            loss, hits, _ = loss_and_hits(model, batch)
            loss.backward()
            result = evaluate(model, task.val, batch_size=8, device=CPU, kind="causal-lm", examples=8)
        model.zero_grad()
    assert (5, VOCAB) in watch.sizes
    assert not watch.sizes & {(8, WINDOW, VOCAB), (8 * WINDOW, VOCAB)}
    plain, plain_hits = score(forward(model, batch), batch.labels)
    torch.testing.assert_close(loss, plain)
    assert hits == plain_hits
    assert result["count"] == 8 * WINDOW


# Windows that grow


def test_windows_double_in_equal_stages():
    config = TrainConfig(length_warmup=300, first_length=1024)
    lengths = [8192 // pieces_at(config, 8192, step) for step in range(302)]
    assert [lengths[step] for step in (0, 99, 100, 199, 200, 299, 300, 301)] == [
        1024, 1024, 2048, 2048, 4096, 4096, 8192, 8192,
    ]  # fmt: skip
    assert lengths == sorted(lengths)


@pytest.mark.parametrize(
    ("length", "first", "shortest"), [(96, 8, 12), (96, 13, 24), (7, 1, 7), (64, 64, 64), (64, 100, 64), (64, 1, 1)]
)
def test_a_window_is_halved_as_far_as_it_goes(length, first, shortest):
    config = TrainConfig(length_warmup=1000, first_length=first)
    assert length // pieces_at(config, length, 0) == shortest
    assert pieces_at(config, length, 1000) == 1


def test_a_batch_in_pieces_has_the_same_tokens_and_labels():
    batch = stream_task().train.batch(np.arange(3))
    pieces = cut(batch, 4)
    assert pieces.inputs.shape == pieces.labels.shape == (12, WINDOW // 4)
    assert torch.equal(pieces.inputs.view(3, WINDOW), batch.inputs)
    assert torch.equal(pieces.labels.view(3, WINDOW), batch.labels)
    masked = cut(replace(batch, mask=batch.inputs > 3), 4)
    assert masked.mask is not None
    assert torch.equal(masked.mask, pieces.inputs > 3)
    assert cut(batch, 1) is batch


def test_a_warm_up_keeps_the_tokens_a_step_and_goes_on_bit_equal(tmp_path):
    task, settings = stream_task(), {"length_warmup": 6, "first_length": 8, "save_every": 4, "eval_every": 6}
    whole = make_run(tmp_path / "whole", model=LM, **settings)
    source = Source(task, whole)
    shapes = [tuple(source.share(step).parts[0].inputs.shape) for step in range(8)]
    assert shapes == [(32, 8)] * 3 + [(16, 16)] * 3 + [(8, 32)] * 2
    assert {source.share(step).targets for step in range(8)} == {8 * WINDOW}
    run_tiny(whole, task)
    in_pieces(make_run(tmp_path / "pieces", model=LM, **settings), task)
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


# States handed on


def test_rows_read_on_and_together_read_everything():
    n, rows = 23, 4
    steps = [consecutive_at(n, rows, step, seed=3) for step in range(2 * n)]
    assert steps[0][1].all()
    for (before, _), (now, fresh) in pairwise(steps):
        assert np.array_equal(now, (before + 1) % n)
        assert np.array_equal(fresh, now == 0)
    for row in range(rows):  # each row the whole stream
        assert sorted(windows[row] for windows, _ in steps[:n]) == list(range(n))
    seen = {int(w) for windows, _ in steps[: -(-n // rows)] for w in windows}  # together within an epoch
    assert seen == set(range(n))
    assert np.array_equal(consecutive_at(n, rows, 7, 3)[0], steps[7][0])
    assert not np.array_equal(consecutive_at(n, rows, 0, 4)[0], steps[0][0])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_steps_on_a_carried_state_are_pieces_of_one_long_sequence(tmp_path, accumulate, checkpoint_blocks):
    """Loss of the windows = loss of the whole; gradients = those of the whole with the state's gradient cut."""
    run = make_run(
        tmp_path, model={**LM, "dropout": 0.0}, batch_size=2, carry_state=True, accumulate=accumulate,
        checkpoint_blocks=checkpoint_blocks,
    )  # fmt: skip
    windows = 16
    task, model = stream_task(windows), make_model(run)
    model.backbone.checkpoint_blocks = checkpoint_blocks
    carried, source, steps = Carried(model, 2, torch.float32), Source(task, run), 5
    total, batches = torch.zeros(2, dtype=torch.float64), []
    for step in range(steps):
        share = source.share(step)
        total += compute_gradients(Objective(model), share.parts, 1, 0, step, CPU, torch.float32, carried)
        carried.keep(torch.zeros(()))
        batches.append([torch.cat([getattr(part, name) for part in share.parts]) for name in ("inputs", "labels")])
    assert not any(consecutive_at(windows, 2, step, 0)[1].any() for step in range(1, steps)), "no row may begin anew"
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    losses, state = [], Carried(model, 2, torch.float32).state
    for inputs, labels in batches:
        loss, _, after = model.loss(inputs, labels, state=state, return_state=True)
        assert after is not None
        losses.append(loss)
        state = after.detach()
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(total[0], torch.stack(losses).sum().detach(), rtol=1e-10, atol=0)
    for gradient, (name, parameter) in zip(gradients, model.named_parameters(), strict=True):
        assert parameter.grad is not None
        error = 1e-5 if name.endswith("decay_logit") else 1e-9  # the decay is float32 in every model
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=error * float(parameter.grad.abs().max()))
    inputs, labels = (torch.cat([batch[k] for batch in batches], dim=1) for k in (0, 1))
    torch.testing.assert_close(model.loss(inputs, labels)[0].detach(), total[0], rtol=1e-10, atol=0)


def test_fresh_rows_begin_with_no_past_and_others_do_not(tmp_path):
    run = make_run(tmp_path, model={**LM, "dropout": 0.0}, batch_size=2, carry_state=True)
    model = make_model(run)
    carried = Carried(model, 2, torch.float32)
    tokens = torch.randint(1, VOCAB, (2, WINDOW))
    batch = Batch(tokens, tokens, fresh=torch.tensor([True, True]))
    assert not any(x.any() for x in carried.before(batch).tensors())
    with torch.no_grad():
        alone = model(tokens)
        _, _, after = loss_and_hits(model, batch, carried.before(batch))
        assert after is not None
        carried.after(after)
        carried.keep(torch.zeros(()))
        later = replace(batch, fresh=torch.tensor([False, True]))
        logits, _ = model.prefill(tokens, state=carried.before(later))
    torch.testing.assert_close(logits[1], alone[1], rtol=1e-10, atol=1e-12)
    assert float((logits[0] - alone[0]).abs().max()) > 1e-3


def test_a_step_that_is_not_finite_leaves_the_state_as_it_was(tmp_path):
    run = make_run(tmp_path, model=LM, batch_size=2, carry_state=True)
    carried = Carried(make_model(run), 2, torch.float32)
    before = carried.state.clone().tensors()
    carried.after(carried.state.map(lambda x: x + torch.nan))
    carried.keep(torch.ones(()))
    for x, y in zip(before, carried.state.tensors(), strict=True):
        assert torch.equal(x, y)


def test_a_run_with_a_carried_state_goes_on_bit_equal(tmp_path):
    """The stream has 12 windows for 2 rows and 16 steps: both rows pass its end."""
    task = stream_task(windows=12)
    settings = {"carry_state": True, "batch_size": 2, "steps": 16, "save_every": 5, "eval_every": 8}
    whole = make_run(tmp_path / "whole", model=LM, **settings)
    run_tiny(whole, task)
    in_pieces(make_run(tmp_path / "pieces", model=LM, **settings), task)
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")
    files = [tmp_path / name / "checkpoint" / "step-00000016" / "carried.safetensors" for name in ("whole", "pieces")]
    assert files[0].read_bytes() == files[1].read_bytes()

    forgetful = make_run(tmp_path / "forgetful", model=LM, **settings)
    with patch.object(checkpoint, "put_back", lambda places, tensors: True):
        in_pieces(forgetful, task)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "whole", tmp_path / "forgetful")


def test_a_carried_state_that_does_not_fit_is_refused(tmp_path):
    run = make_run(tmp_path, model=LM, batch_size=2, carry_state=True)
    carried = Carried(make_model(run), 2, torch.float32)
    tensors = {name: x + 1 for name, x in carried.to_tensors().items()}
    assert not put_back(carried.to_tensors(), {**tensors, "0000": torch.zeros(1)})
    assert not put_back(carried.to_tensors(), {"0000": tensors["0000"]})
    assert not any(x.any() for x in carried.state.tensors())
    assert put_back(carried.to_tensors(), tensors)
    assert all(torch.equal(x, tensors[name]) for name, x in carried.to_tensors().items())


def test_carrying_a_state_tells_more_than_a_window(tmp_path):
    """A token is nearly always that of 12 steps before: nothing in windows of 8 tells it, a state does."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB, 4001)
    for i in range(12, len(tokens)):
        if rng.random() < 0.9:
            tokens[i] = tokens[i - 12]
    task = replace(stream_task(), train=StreamSplit(tokens, 8), max_length=8)
    losses = []
    for carry in (False, True):
        run = make_run(
            tmp_path / str(carry), model={**LM, "dropout": 0.0, "d_model": 16, "attention": False}, carry_state=carry,
            optim={"lr": 2e-2, "warmup": 10}, steps=200, log_every=25, eval_every=200, save_every=200, eval_examples=8,
        )  # fmt: skip
        run_tiny(run, task)
        losses.append([e["loss"] for e in journal.read(run.folder / "metrics.jsonl") if e["kind"] == "train"][-1])
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({}, {"length_warmup": 5, "carry_state": True}, "take one of them"),
        ({}, {"pad_multiple": 8, "carry_state": True}, r"train\.carry_state takes no padding"),
        ({"mixer": "transformer"}, {"carry_state": True}, r"model\.mixer transformer has none"),
        ({"branch_norm": True}, {"carry_state": True}, "set --model.no-branch-norm"),
        ({}, {"batch_size": 64, "carry_state": True}, "40 windows: set a smaller --train.batch-size"),
    ],
)
def test_what_cannot_be_carried_is_refused(tmp_path, model, settings, message):
    with pytest.raises(ValueError, match=message):
        run_tiny(make_run(tmp_path / "run", model={**LM, **model}, **settings), stream_task())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"length_warmup": 5}, "needs them whole"), ({"carry_state": True}, "do not follow each other")],
)
def test_other_tasks_take_neither(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run_tiny(make_run(tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


# Blocks computed again


def gradients(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    model.zero_grad()
    compute_gradients(Objective(model), [batch], 1, 0, 0, CPU, torch.float32)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("mixer", ["chela", "transformer"])
@pytest.mark.parametrize("model", [{"dropout": 0.0}, {"dropout": 0.3, "tap_dropout": 0.2}])
def test_blocks_computed_again_give_the_same_bits_with_dropout_too(tmp_path, mixer, model):
    run = make_run(tmp_path, model={**LM, **model, "mixer": mixer})
    network, batch = make_model(run, torch.float32), stream_task().train.batch(np.arange(3))
    calls = []
    network.backbone.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    results = []
    for again in (False, True):
        network.backbone.checkpoint_blocks = again
        calls.clear()
        results.append(gradients(network, batch))
        assert len(calls) >= 1 if not again else len(calls) <= 2
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
    network.eval()
    assert torch.equal(network(batch.inputs), network(batch.inputs))


def test_blocks_computed_again_keep_their_inputs_alone(tmp_path):
    run = make_run(tmp_path, model={**LM, "layers": 6})
    network, batch = make_model(run, torch.float32), stream_task().train.batch(np.arange(3))
    kept = []
    for again in (False, True):
        network.backbone.checkpoint_blocks = again
        kept.append(saved_bytes(lambda: loss_and_hits(network, batch)[0]))
    one = 4 * batch.inputs.numel() * run.model.d_model  # the input of a block
    parameters = 4 * sum(p.numel() for p in network.parameters())
    assert kept[1] < 12 * one + 2 * parameters < kept[0]


@pytest.mark.parametrize(
    ("mixer", "dropout", "carry"), [("chela", 0.3, False), ("chela", 0.0, True), ("transformer", 0.3, False)]
)
def test_compiled_blocks_are_computed_again_too(tmp_path, mixer, dropout, carry):
    # without decay: compiled, the gradient of the reference's decay ** T stumbles over a length that may change
    model = {**LM, "dropout": dropout, "mixer": mixer, "decay": False}
    run = make_run(tmp_path, model=model, batch_size=3, carry_state=carry)
    network, batch = make_model(run, torch.float32), stream_task().train.batch(np.arange(3))
    batch = replace(batch, fresh=torch.zeros(3, dtype=torch.bool)) if carry else batch
    carried = Carried(network, 3, torch.float32) if carry else None
    for block in network.backbone.blocks:
        block.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    results = []
    for again in (False, True):
        network.backbone.checkpoint_blocks = again
        network.zero_grad()
        compute_gradients(Objective(network), [batch], 1, 0, 0, CPU, torch.float32, carried)
        results.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
        if carried is not None:
            carried.forget()
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    if not dropout:
        with uncompiled(network):
            compute_gradients(Objective(network), [batch], 1, 0, 0, CPU, torch.float32, carried)


def test_a_run_with_blocks_computed_again_is_the_same_run(tmp_path):
    task = stream_task()
    for name, again in (("plain", False), ("again", True)):
        run_tiny(make_run(tmp_path / name, model=LM, checkpoint_blocks=again), task)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "again")]
    assert weights[0] == weights[1]


def test_a_baseline_trains_with_the_same_trainer(tmp_path):
    run = make_run(
        tmp_path, model={**LM, "mixer": "transformer", "dropout": 0.0, "d_model": 32, "d_ff": 64, "heads": 2},
        optim={"lr": 1e-2, "warmup": 10}, steps=120, log_every=10, eval_every=60, save_every=60,
    )  # fmt: skip
    result, _ = run_tiny(run, stream_task())
    assert result.test is not None
    assert result.test["loss"] < 0.7 * np.log(VOCAB)
    assert len(make_optimizer(make_model(run), run.optim).param_groups) == 2


# On a GPU

gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("settings", [{"carry_state": True}, {"checkpoint_blocks": True}, {"length_warmup": 20}])
def test_recorded_updates_give_the_numbers_of_plain_ones(tmp_path, settings):
    curves = []
    for name, compiled in (("plain", False), ("recorded", True)):
        run = make_run(
            tmp_path / name, model={**LM, "dropout": 0.0}, steps=60, log_every=10, eval_every=60, save_every=60,
            device="cuda", dtype="float32", compile=compiled, first_length=8, **settings,
        )  # fmt: skip
        run_tiny(run, stream_task())
        curves.append([e["loss"] for e in journal.read(run.folder / "metrics.jsonl") if e["kind"] == "train"])
    assert np.allclose(curves[0], curves[1], rtol=1e-3)


@gpu
def test_a_recorded_run_with_a_carried_state_goes_on_bit_equal(tmp_path):
    settings = {"carry_state": True, "batch_size": 2, "steps": 16, "save_every": 5, "device": "cuda"}
    task = stream_task(windows=12)
    run_tiny(make_run(tmp_path / "whole", model=LM, **settings), task)
    in_pieces(make_run(tmp_path / "pieces", model=LM, **settings), task)
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")
