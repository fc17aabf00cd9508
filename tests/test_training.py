import json
import math
from dataclasses import replace
from io import StringIO
from unittest.mock import patch

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from chela.config import ModelConfig
from chela.data import Batch, indices_at
from chela.models import build, load_model
from chela.training import NonFinite, evaluate, journal, train
from chela.training.device import compute_type, peak_memory, pick_device
from chela.training.guard import Guard, check_weights
from chela.training.metrics import better, forward, score
from chela.training.optim import make_optimizer
from chela.training.step import Objective, clip_gradients, compute_gradients, dropout_seed
from chela.training.stream import Source, Stream
from chela.training.update import Learner
from test_checkpoint import assert_same_run, tree  # pyrefly: ignore
from training_kit import CLASSES, LENGTH, VOCAB, make_run, make_task, run_tiny, tiny_task  # pyrefly: ignore

CPU = torch.device("cpu")
KINDS = {
    "classifier": {},
    "two-tower": {"kind": "two-tower", "classes": 2},
    "causal-lm": {"kind": "causal-lm", "causal": True},
}


def gradients_of(model: nn.Module) -> list[torch.Tensor]:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    return gradients


def real(mask: torch.Tensor | None) -> int:
    assert mask is not None
    return int(mask.sum())


def lines(folder, kind):
    return [entry for entry in journal.read(folder / "metrics.jsonl") if entry["kind"] == kind]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_its_task_by_heart(tmp_path, kind):
    run = make_run(
        tmp_path,
        model={**KINDS[kind], "dropout": 0.0, "d_model": 16},
        optim={"lr": 2e-2, "warmup": 5},
        steps=120,
        eval_every=60,
        log_every=10,
    )
    task = make_task(kind, train_examples=8)
    result, _ = run_tiny(run, task)
    assert result.status == "done"
    first, *_, last = lines(tmp_path, "train")
    assert last["loss"] < 0.3 * first["loss"]
    assert last["accuracy"] > 0.9


def test_a_run_folder_holds_its_record(tmp_path):
    result, printed = run_tiny(make_run(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        ".lock",
        "config.toml",
        "metrics.jsonl",
        "model.safetensors",
        "checkpoint",
    }
    kinds = [entry["kind"] for entry in journal.read(tmp_path / "metrics.jsonl")]
    assert (kinds[0], kinds[-2:]) == ("start", ["test", "end"])
    assert [entry["step"] for entry in lines(tmp_path, "train")] == [2, 4, 6, 8, 10, 12]
    assert [entry["step"] for entry in lines(tmp_path, "val")] == [4, 8, 12]
    assert {"loss", "accuracy", "lr", "grad_norm", "tokens_per_s"} <= lines(tmp_path, "train")[0].keys()
    assert {"torch", "device", "parameters", "processes", "dtype"} <= lines(tmp_path, "start")[0].keys()
    assert not any("peak_gib" in entry for entry in journal.read(tmp_path / "metrics.jsonl")), (
        "no GPU, no memory of one"
    )
    end = lines(tmp_path, "end")[0]
    assert (end["test"], end["best"]) == (result.test, result.validation)
    assert f"test accuracy {100 * result.test['accuracy']:.2f} %" in printed
    assert "majority class 40.0 %" in printed


def test_tokens_are_counted_without_padding(tmp_path):
    run = make_run(tmp_path)
    source = Source(make_task(), run)
    read = [source.share(step).tokens for step in range(run.train.steps)]
    run_tiny(run)
    assert [entry["tokens"] for entry in lines(tmp_path, "train")] == [sum(read[:end]) for end in range(2, 13, 2)]
    assert len({*read}) > 1, "take sequences of several lengths"


def test_the_most_memory_of_a_gpu_is_noted_at_validations_and_at_the_end(tmp_path, monkeypatch):
    assert peak_memory(CPU) == {}
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 3 * 2**29 + (device.index or 0))
    assert peak_memory(torch.device("cuda", 0)) == {"peak_gib": 1.5}
    with patch("chela.training.loop.peak_memory", lambda device: {"peak_gib": 1.5}):
        run_tiny(make_run(tmp_path))
    assert [entry["peak_gib"] for entry in lines(tmp_path, "val") + lines(tmp_path, "end")] == [1.5] * 4


def test_the_best_weights_are_tested_not_the_last(tmp_path):
    run = make_run(tmp_path, optim={"lr": 0.3, "schedule": "constant"}, eval_every=1, steps=8)
    result, _ = run_tiny(run)
    validations = lines(tmp_path, "val")
    best = max(validations, key=lambda entry: (entry["accuracy"], -entry["loss"]))
    assert result.validation["step"] == best["step"] < 8, "take another rate: the last step must not be the best"
    model = load_model(tmp_path / "model.safetensors", run.model)
    task = make_task()
    assert evaluate(model, task.test, batch_size=8, device=CPU) == result.test
    assert evaluate(model, task.val, batch_size=8, device=CPU)["loss"] == result.validation["loss"]


def test_the_last_step_is_logged_validated_and_saved(tmp_path):
    run_tiny(make_run(tmp_path, steps=5, log_every=100, eval_every=100, save_every=100))
    assert [entry["step"] for entry in lines(tmp_path, "train") + lines(tmp_path, "val")] == [5, 5]
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-00000005"]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path):
    for name in "ab":
        run_tiny(make_run(tmp_path / name, deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled()
    assert_same_run(tmp_path / "a", tmp_path / "b")
    run_tiny(replace(make_run(tmp_path / "c"), seed=1))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() != (tmp_path / "c" / "model.safetensors").read_bytes()


def test_deterministic_is_asked_for_while_training(tmp_path):
    seen = []
    with patch(
        "chela.training.loop.build", lambda c: seen.append(torch.are_deterministic_algorithms_enabled()) or build(c)
    ):
        run_tiny(make_run(tmp_path, deterministic=True, steps=1))
    assert seen == [True]


# What does not fit is refused before anything is written.


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({"vocab": 11}, {}, r"model\.vocab is 11, but task words needs 12: set --model\.vocab 12"),
        ({"classes": 4}, {}, r"model\.classes is 4, but task words needs 3"),
        ({"inputs": "real"}, {}, r"model\.inputs is real, but task words needs tokens"),
        ({"kind": "two-tower"}, {}, r"model\.kind is two-tower, but task words needs classifier"),
        (
            {"kernel_length": 8},
            {},
            r"sequences of up to 16 tokens are longer than model\.kernel_length 8; "
            r"set --model\.kernel-length 16 or cut with --data\.max-length 8",
        ),
        ({"merged": True}, {}, r"model\.merged"),
        ({}, {"accumulate": 3}, r"train\.batch_size 8 cannot be cut .* multiple of 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, model, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        run_tiny(make_run(tmp_path / "run", model=model, **settings), make_task("classifier"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_kernel_of_length_0_and_a_language_model_take_any_length(tmp_path):
    run_tiny(make_run(tmp_path / "a", model={"kernel_length": 0}, steps=1))
    run_tiny(make_run(tmp_path / "b", model={**KINDS["causal-lm"], "kernel_length": 4}, steps=1))


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no training examples"):
        run_tiny(make_run(tmp_path / "run"), make_task(train_examples=0))


def test_a_missing_gpu_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=r"train\.device is cuda"):
        run_tiny(make_run(tmp_path / "run", device="cuda"))
    assert not (tmp_path / "run").exists()


def test_a_token_out_of_range_is_refused(tmp_path):
    run = make_run(tmp_path, model={"vocab": 5})
    with pytest.raises(ValueError, match=r"token id \d+ is outside the model's vocabulary 0\.\.4"):
        Source(make_task(), run).share(0)


@pytest.mark.parametrize("wrong", [CLASSES, -1])
def test_a_label_out_of_range_is_refused(tmp_path, wrong):
    task = make_task()
    task.train.labels[17] = wrong
    with pytest.raises(ValueError, match=rf"label {wrong}, but the model's outputs are 0\.\.{CLASSES - 1}"):
        run_tiny(make_run(tmp_path, steps=7), task)


# Slices


@pytest.fixture
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_any_slicing_gives_the_same_gradient(tmp_path, doubles, kind):
    run = make_run(tmp_path, model={**KINDS[kind], "dropout": 0.0})
    task = make_task(kind)
    gradients, scores = [], []
    for parts in (1, 2, 4, 8):
        torch.manual_seed(0)
        model = build(run.model)
        share = Source(task, replace(run, train=replace(run.train, accumulate=parts))).share(3)
        assert len(share.parts) == parts
        scores.append(compute_gradients(Objective(model), share.parts, share.targets, 0, 3, CPU, torch.float32))
        gradients.append(torch.cat([g.flatten() for g in gradients_of(model)]))
    # float64: a few hundred rounded additions of numbers no larger than the largest gradient
    for gradient, each in zip(gradients, scores, strict=True):
        torch.testing.assert_close(gradient, gradients[0], rtol=0, atol=1e-12 * float(gradients[0].abs().max()))
        torch.testing.assert_close(each, scores[0], rtol=1e-12, atol=0)


def test_label_smoothing_spreads_a_share_of_each_label_while_training_alone(tmp_path, doubles):
    run, task = make_run(tmp_path, model={"dropout": 0.0}, label_smoothing=0.3), make_task()
    torch.manual_seed(0)
    model = build(run.model)
    batch = task.train.batch(np.arange(8))
    guard, sums = Guard(CPU), torch.zeros(3, dtype=torch.float64)
    learner = Learner(model, make_optimizer(model, run.optim), guard, sums, run, torch.float32)
    loss, hits, _ = learner.objective()(batch)
    log_p = forward(model, batch).log_softmax(-1)
    own = -log_p.gather(1, batch.labels[:, None]).sum()
    torch.testing.assert_close(loss, 0.7 * own - 0.3 * log_p.mean(1).sum(), rtol=1e-12, atol=0)
    plain, plain_hits = score(forward(model, batch), batch.labels)
    torch.testing.assert_close(plain, own, rtol=1e-12, atol=0)
    assert hits == plain_hits
    with pytest.raises(ValueError, match=r"train\.label_smoothing is for classifiers"):
        replace(run, model=replace(run.model, kind="causal-lm", causal=True))


def test_the_gradient_is_that_of_the_mean_over_the_global_batch(tmp_path, doubles):
    run = make_run(tmp_path, model={"dropout": 0.0}, accumulate=4)
    task = make_task()
    torch.manual_seed(0)
    model = build(run.model)
    share = Source(task, run).share(0)
    compute_gradients(Objective(model), share.parts, share.targets, 0, 0, CPU, torch.float32)
    sliced = [g.clone() for g in gradients_of(model)]
    model.zero_grad()
    whole = task.train.batch(indices_at(len(task.train), 8, 0, run.seed))
    nn.functional.cross_entropy(model(whole.inputs, whole.mask), whole.labels).backward()
    for gradient, expected in zip(sliced, gradients_of(model), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_shares_of_all_processes_are_the_global_batch(tmp_path, monkeypatch):
    run = make_run(tmp_path, accumulate=2)
    task = make_task()
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        seen += [label for part in Source(task, run).share(5).parts for label in part.labels.tolist()]
    assert seen == task.train.labels[indices_at(len(task.train), 8, 5, run.seed)].tolist()


def test_a_share_counts_targets_and_tokens(tmp_path):
    run = make_run(tmp_path, model=KINDS["causal-lm"], accumulate=2)
    share = Source(make_task("causal-lm"), run).share(0)
    tokens = sum(real(part.mask) for part in share.parts)
    assert (share.tokens, share.targets) == (tokens, tokens - 8)  # the last token of each sequence has no next
    run = make_run(tmp_path, model=KINDS["two-tower"])
    share = Source(make_task("two-tower"), run).share(0)
    assert share.tokens == sum(real(p.mask) + real(p.second_mask) for p in share.parts)
    assert share.targets == 8


def test_the_stream_gives_the_shares_in_any_order(tmp_path):
    run, task = make_run(tmp_path), make_task()
    with Stream(Source(task, run), run.train.steps, CPU) as stream:
        for step in (0, 1, 2, 7, 8, 3, 11):
            assert torch.equal(stream.take(step).parts[0].inputs, Source(task, run).share(step).parts[0].inputs)


def test_dropout_is_seeded_by_step_rank_and_part_alone(tmp_path):
    seeds = [dropout_seed(*numbers) for numbers in np.ndindex(3, 3, 3, 3)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    run, task = make_run(tmp_path, model={"dropout": 0.5}), make_task()
    torch.manual_seed(0)
    model = build(run.model)
    share = Source(task, run).share(0)

    def loss(step: int) -> float:
        torch.rand(5)  # whatever happened to the generator before
        return float(compute_gradients(Objective(model), share.parts, 8, 0, step, CPU, torch.float32)[0])

    assert loss(1) == loss(1) != loss(2)


def test_clipping_returns_the_norm_before():
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert float(clip_gradients(model, 0.0)) == 5
    assert torch.equal(model.weight.grad, torch.tensor([[3.0, 4.0]]))
    assert float(clip_gradients(model, 1.0)) == 5
    assert float(model.weight.grad.norm()) == pytest.approx(1, rel=1e-6)


def test_bfloat16_computes_low_and_keeps_float32(tmp_path):
    run = make_run(tmp_path, dtype="bfloat16")
    torch.manual_seed(0)
    model = build(run.model)
    seen = []
    model.head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    share = Source(make_task(), run).share(0)
    compute_gradients(Objective(model), share.parts, 8, 0, 0, CPU, compute_type("bfloat16", CPU))
    assert seen == [torch.bfloat16]
    assert all(p.dtype == torch.float32 for p in [*model.parameters(), *gradients_of(model)])
    assert run_tiny(run)[0].status == "done"
    assert load_model(tmp_path / "model.safetensors").head.weight.dtype == torch.float32


def test_auto_is_bfloat16_on_a_gpu_alone():
    assert compute_type("auto", CPU) == compute_type("float32", torch.device("cuda")) == torch.float32
    assert compute_type("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_device("cpu") == CPU


# Evaluation


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_counts_every_label_once(tmp_path, kind):
    torch.manual_seed(0)
    model = build(make_run(tmp_path, model=KINDS[kind]).model)
    task = make_task(kind)
    losses, hits = [], []
    model.eval()
    for index in range(len(task.val)):
        one = task.val.batch(np.array([index]))
        inputs = [one.inputs] if one.second is None else [one.inputs, one.second]
        with torch.no_grad():
            logits = model(*inputs).reshape(-1, VOCAB if kind == "causal-lm" else model.config.classes)
        for logit, label in zip(logits, one.labels.flatten(), strict=True):
            if label != -100:
                losses.append(float(nn.functional.cross_entropy(logit, label)))
                hits.append(float(logit.argmax() == label))
    model.train()
    result = evaluate(model, task.val, batch_size=4, device=CPU, kind=kind)
    assert model.training
    assert result["count"] == len(losses)
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result["accuracy"] == pytest.approx(np.mean(hits))
    assert ("perplexity" in result) == (kind == "causal-lm")


class Bytes:
    """A split of zeros over 256 symbols."""

    def __len__(self) -> int:
        return 3

    def batch(self, indices: np.ndarray) -> Batch:
        zeros = torch.zeros(len(indices), 5, dtype=torch.int64)
        return Batch(zeros, zeros, None, None, None)


class Uniform(nn.Module):
    config = ModelConfig(kind="causal-lm", causal=True, vocab=256)

    def forward(self, inputs, mask):
        return torch.zeros(*inputs.shape, 256)


def test_a_uniform_model_of_bytes_needs_8_bits():
    result = evaluate(Uniform(), Bytes(), batch_size=2, device=CPU, kind="causal-lm")
    assert result["bits_per_byte"] == pytest.approx(8, rel=1e-6)
    assert result["perplexity"] == pytest.approx(256, rel=1e-5)
    assert (result["accuracy"], result["count"]) == (1.0, 15)


def test_few_examples_are_spread_over_the_split(tmp_path):
    task, seen = make_task(), []

    class Watched:
        def __len__(self) -> int:
            return 21

        def batch(self, indices: np.ndarray) -> Batch:
            seen.extend(indices.tolist())
            return task.val.batch(indices)

    model = build(make_run(tmp_path).model)
    assert evaluate(model, Watched(), batch_size=2, device=CPU, examples=7)["count"] == 7
    assert seen == [0, 3, 6, 9, 12, 15, 18]
    assert evaluate(model, Watched(), batch_size=2, device=CPU, examples=99)["count"] == 21


def test_better_means_accuracy_then_loss_or_loss_alone():
    good, bad = {"accuracy": 0.9, "loss": 0.5}, {"accuracy": 0.8, "loss": 0.4}
    assert better(bad, None, "classifier")
    assert better(good, bad, "classifier")
    assert not better(bad, good, "classifier")
    assert better({**good, "loss": 0.4}, good, "classifier")
    assert not better(good, good, "classifier")
    assert better(bad, good, "causal-lm")


# Numbers that are not finite


class NoGradient(nn.Module):
    """Finite, with a gradient that is not: the square root at zero."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.zero = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.inner(x) + self.zero.sqrt()


def poisoned(poison):
    def make(config: ModelConfig) -> nn.Module:
        model = build(config)
        poison(model)
        return model

    return patch("chela.training.loop.build", make)


def fill(name: str, value: float):
    return lambda model: model.get_parameter(name).data.fill_(value)


@pytest.mark.parametrize(
    ("poison", "where"),
    [
        (fill("backbone.blocks.1.feed_forward.0.bias", math.inf), r"output of backbone\.blocks\.1\.feed_forward\.0 "),
        (fill("head.bias", math.nan), r"output of head "),
        (
            fill("backbone.blocks.0.layer.attention.q_gain", math.nan),
            r"output of backbone\.blocks\.0\.layer\.attention \(before backbone\.blocks\.0\.layer\.attention\.out\)",
        ),
        (lambda model: setattr(model, "head", NoGradient(model.head)), r"gradient of head\.zero, after a finite"),
    ],
)
def test_the_first_layer_that_is_not_finite_is_named(tmp_path, poison, where):
    with poisoned(poison), pytest.raises(NonFinite, match=where) as caught:
        run_tiny(make_run(tmp_path))
    assert "at step 1, " in str(caught.value)
    assert "no checkpoint had been saved" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "checkpoint").iterdir())
    assert lines(tmp_path, "end")[0]["status"] == "failed"
    assert not lines(tmp_path, "train")


class RealTask:
    """The words as real values; one example is NaN."""

    def __init__(self, split, poisoned: int) -> None:
        self.split, self.poisoned = split, poisoned

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, indices: np.ndarray) -> Batch:
        batch = self.split.batch(indices)
        values = batch.inputs.unsqueeze(-1) / VOCAB
        values[torch.from_numpy(indices == self.poisoned)] = math.nan
        return replace(batch, inputs=values)


def test_the_bad_step_is_found_and_the_last_checkpoint_stays(tmp_path):
    task = replace(make_task(), inputs="real")
    bad = 3
    poisoned = int(indices_at(50, 8, bad, 0)[5])  # 50 examples: nothing comes twice in the first six steps
    task = replace(task, train=RealTask(task.train, poisoned), val=RealTask(task.val, -1))
    run = make_run(tmp_path, model={"inputs": "real"}, steps=99, save_every=1, log_every=99, eval_every=99)
    with pytest.raises(NonFinite, match=rf"at step {bad + 1}, already in the examples") as caught:
        run_tiny(run, task)
    assert f"the checkpoint of step {bad} stays" in str(caught.value)
    before = tree(tmp_path / "checkpoint")
    with pytest.raises(NonFinite):
        run_tiny(run, task)
    assert tree(tmp_path / "checkpoint") == before
    # the same step is named when the loop looks long after it
    late = replace(run, out=tmp_path / "late", train=replace(run.train, save_every=99))
    with pytest.raises(NonFinite, match=rf"at step {bad + 1}, already in the examples"):
        run_tiny(late, task)


def test_weights_that_are_not_finite_are_never_saved():
    model = nn.Linear(2, 2)
    check_weights(model)
    model.bias.data[1] = math.inf
    with pytest.raises(NonFinite, match="bias is no longer finite"):
        check_weights(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "the val loss is not finite at step 4; the checkpoint of step 3 stays"),
        ({"norm": "batch"}, r"step 4 \(batch norm's .* try a lower optim.lr or model.norm layer\); the checkpoint"),
        ({"norm": "batch", "feed_forward": "swiglu"}, "lower optim.lr, model.feed_forward bounded-swiglu or model"),
    ],
)
def test_a_validation_that_is_not_finite_ends_the_run(tmp_path, model, message):
    task = make_task()
    result = {"loss": math.nan, "accuracy": 0.0, "count": 1}
    with patch("chela.training.metrics.evaluate", return_value=result), pytest.raises(NonFinite, match=message):
        run_tiny(make_run(tmp_path, model=model), task)
    assert not (tmp_path / "model.safetensors").exists()


# Advice and display


def test_still_at_chance_is_said_once(tmp_path):
    run = make_run(tmp_path, optim={"lr": 1e-9}, chance_after=5)
    _, printed = run_tiny(run, replace(make_task(), chance_loss=0.5))
    assert printed.count("warning: after 6 steps the training loss") == 1
    assert "warm" in printed
    assert [entry["step"] for entry in lines(tmp_path, "warning")] == [6]


@pytest.mark.parametrize("settings", [{"chance_after": 0}, {"chance_after": 5, "chance": 99.0}])
def test_no_warning_when_it_learns_or_is_not_wanted(tmp_path, settings):
    task = replace(make_task(), chance_loss=settings.pop("chance", 0.5))
    _, printed = run_tiny(make_run(tmp_path, **settings), task)
    assert "warning:" not in printed


def test_a_terminal_shows_a_bar_and_a_file_plain_lines(tmp_path):
    box = StringIO()
    with tiny_task(make_task()):
        train(make_run(tmp_path / "a"), console=Console(file=box, force_terminal=True, width=120, color_system=None))
    assert "step 12/12" in box.getvalue()
    assert "━" in box.getvalue()
    _, printed = run_tiny(make_run(tmp_path / "b"))
    assert "━" not in printed
    assert "step 2/12: loss" in printed
    assert "step 4: validation accuracy" in printed


def test_plain_lines_of_training_are_at_most_one_every_two_seconds(tmp_path):
    _, printed = run_tiny(make_run(tmp_path, steps=30, log_every=1, eval_every=10))
    assert len([line for line in printed.splitlines() if "tokens/s" in line]) < 15
    assert len([line for line in printed.splitlines() if "validation" in line and line.startswith("step")]) == 3


def test_the_task_says_what_its_data_are_not(tmp_path):
    note = "held-out part of the training split; not the published test set"
    _, printed = run_tiny(make_run(tmp_path, steps=1), replace(make_task(), note=note))
    assert note in printed


def test_the_journal_is_strict_json(tmp_path):
    log = journal.Journal(tmp_path / "metrics.jsonl")
    log.write("val", loss=0.5)
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write("val", loss=math.nan)
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"kind": "val", "loss": 0.5}


def test_lengths_are_those_of_the_task():
    assert make_task().train.batch(np.arange(50)).inputs.shape == (50, LENGTH)


def test_tensorboard_gets_the_journals_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # pyrefly: ignore

    run = make_run(tmp_path / "run", tensorboard=True)
    run_tiny(run)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    losses = {line["step"]: line["loss"] for line in lines(tmp_path / "run", "train")}
    assert {event.step: event.value for event in board.Scalars("train/loss")} == pytest.approx(losses)
    assert {"val/accuracy", "test/loss", "train/lr"} <= set(board.Tags()["scalars"])


def test_tensorboard_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("chela.training.board.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package tensorboard: pip install 'chela\[track\]'"):
        run_tiny(make_run(tmp_path / "run", tensorboard=True))
    assert not (tmp_path / "run" / "checkpoint").exists()
