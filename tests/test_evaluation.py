import importlib
import itertools
import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chela.cli.commands import training
from chela.cli.parse import call
from chela.config import DataConfig, ModelConfig, RunConfig
from chela.data import load_task
from chela.evaluation import evaluate_run, generate
from chela.evaluation.datasets import describe_task, inventory
from chela.evaluation.doctor import diagnose
from chela.evaluation.generate import generate_run, penalise, sample, until
from chela.evaluation.runs import Run, command, group, load_run, place, read_run
from chela.models import CausalLM, build, save_model
from chela.ops.impl import WITH_TRITON
from chela.presets import PRESETS, preset
from chela.record import save_toml
from cli_kit import chela, contents, train_bytes, train_digits, write_texts  # pyrefly: ignore

generate_module = importlib.import_module("chela.evaluation.generate")  # its name is that of its function
TINY = ModelConfig(
    kind="causal-lm", causal=True, vocab=11, layers=2, d_model=8, d_ff=8, d_key=4, d_value=8, kernel_length=16,
    branches=(3,),
)  # fmt: skip


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "run"
    train_digits(folder)
    return folder


@pytest.fixture(scope="module")
def bytes_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("bytes")
    write_texts(root)
    train_bytes(root / "run", root)
    return root / "run"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build(TINY).eval()
    assert isinstance(model, CausalLM)
    return model


# Evaluation


@pytest.mark.parametrize("name", ["digits_run", "bytes_run"])
def test_evaluation_gives_the_numbers_of_the_training(name, request):
    folder = request.getfixturevalue(name)
    recorded, best = read_run(folder).test, read_run(folder).best
    assert recorded is not None
    assert best is not None
    before = contents(folder)
    found = evaluate_run(folder)
    assert found.result == pytest.approx(recorded)
    assert evaluate_run(folder, batch_size=5).result == pytest.approx(recorded, rel=1e-5)
    task = load_task(read_run(folder).config.data)
    assert evaluate_run(folder, "val").examples == len(task.val), "all of it, whatever train.eval_examples says"
    assert contents(folder) == before


def test_evaluation_counts_hits_as_the_model_answers(digits_run):
    run, model = load_run(digits_run)
    test = load_task(run.data).test
    batch = test.batch(np.arange(len(test)))
    with torch.no_grad():
        hits = (model(batch.inputs).argmax(-1) == batch.labels).float().mean()
    found = evaluate_run(digits_run)
    assert found.result["accuracy"] == pytest.approx(float(hits))
    assert found.examples == found.result["count"] == 359


def test_an_evaluation_in_words(digits_run):
    found = evaluate_run(digits_run)
    first, baseline, note = found.describe().splitlines()
    assert first.startswith("digits, test split, 359 examples: accuracy ")
    assert baseline == "  baseline, majority class: 10.03 %"
    assert "no published split" in note
    assert "baseline" not in evaluate_run(digits_run, "val").describe(), "baselines are those of the test split"


def test_merged_weights_are_evaluated_too(digits_run, tmp_path):
    run, model = load_run(digits_run)
    model.merge()
    save_model(model, tmp_path / "model.safetensors")
    save_toml(replace(run, model=model.config), tmp_path / "config.toml")
    assert evaluate_run(tmp_path).result == pytest.approx(evaluate_run(digits_run).result, rel=1e-4)


def test_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="torch sees no CUDA GPU here"):
        place("cuda")
    assert place("auto") == place("cpu") == torch.device("cpu")


# Generation


def greedy(model: CausalLM, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation, by whole passes."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_generation_is_the_continuation_that_whole_passes_give(model):
    prompt = [3, 1, 4, 1, 5]
    found = [int(token) for token in generate(model, [prompt], 20, temperature=0)]
    assert found == greedy(model, prompt, 20), "20 tokens: past the kernel's 16 lags too"


def test_products_are_narrow_while_a_model_computes_and_at_no_other_time(model, monkeypatch):
    narrow = []
    forward = model.backbone.forward

    def watched(*words, **named):
        narrow.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return forward(*words, **named)

    monkeypatch.setattr(model.backbone, "forward", watched)
    for dtype, wanted in ((torch.bfloat16, torch.bfloat16), (torch.float32, False)):
        narrow.clear()
        for _ in generate(model, [[3, 1]], 3, temperature=0, dtype=dtype):
            assert not torch.is_autocast_enabled("cpu")
        assert narrow == [wanted] * 3


def test_a_run_generates_in_the_type_it_was_trained_in(bytes_run, monkeypatch):
    asked = []
    plain = generate_module.generate
    monkeypatch.setattr(generate_module, "generate", lambda *w, **n: asked.append(n["dtype"]) or plain(*w, **n))
    narrow = replace(load_run(bytes_run, torch.device("cpu"))[0].train, dtype="bfloat16")
    for dtype in ("auto", "float32", "bfloat16"):
        generate_run(bytes_run, "the", 2, dtype=dtype, device="cpu")
    load = generate_module.load_run
    monkeypatch.setattr(generate_module, "load_run", lambda *w: (replace((r := load(*w))[0], train=narrow), r[1]))
    generate_run(bytes_run, "the", 2, device="cpu")
    assert asked == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]


def test_a_draw_is_that_of_multinomial():
    logits = torch.randn(500, 9)
    for top_k in (0, 9):
        found = sample(logits, generator=torch.Generator().manual_seed(3), top_k=top_k)
        order = logits.sort(descending=True, stable=True).indices if top_k else torch.arange(9).expand(500, 9)
        probabilities = logits.softmax(-1).gather(1, order)
        expected = probabilities.multinomial(1, generator=torch.Generator().manual_seed(3))
        assert float((found == order.gather(1, expected).squeeze(1)).float().mean()) > 0.99


def test_prompts_of_different_lengths_continue_as_each_alone(model):
    prompts = [[3], [1, 4, 1, 5, 9, 2, 6], [5, 3, 5]]
    together = torch.stack(list(generate(model, prompts, 9, temperature=0)), 1).tolist()
    assert together == [greedy(model, prompt, 9) for prompt in prompts]


def test_the_seed_decides(model):
    def draw(seed: int) -> list[list[int]]:
        return [token.tolist() for token in generate(model, [[1], [2]], 12, seed=seed)]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_tokens_come_one_by_one(model, monkeypatch):
    steps = []
    step = model.step
    monkeypatch.setattr(model, "step", lambda *words, **named: steps.append(1) or step(*words, **named))
    stream = generate(model, [[1, 2]], 3)
    next(stream)
    assert not steps, "the first token needs the prompt alone"
    assert len(list(stream)) == 2
    assert len(steps) == 2, "nothing is computed for a token nobody asked for"


@given(seed=st.integers(0, 99), top_k=st.integers(0, 7), top_p=st.floats(0.05, 1), temperature=st.floats(0.2, 3))
def test_samples_stay_among_the_likely_tokens(seed, top_k, top_p, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 7, generator=generator)
    chosen = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    shares = (logits / temperature).softmax(-1)
    rank = (shares > shares.gather(1, chosen[:, None])).sum(1)
    likelier = (shares * (shares > shares.gather(1, chosen[:, None]))).sum(1)
    if top_k:
        assert (rank < top_k).all()
        shares = shares * (torch.argsort(torch.argsort(-shares)) < top_k)
        likelier = likelier / shares.sum(1)
    assert (likelier < top_p + 1e-6).all()


def test_samples_follow_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.5, 0.3, 0.2])
    drawn = sample(shares.log().expand(20_000, 3), generator=generator).bincount(minlength=3) / 20_000
    assert (drawn - shares).abs().max() < 5 * math.sqrt(0.25 / 20_000), "five standard deviations"
    hot = sample(shares.log().expand(20_000, 3), temperature=0.5, generator=generator).bincount(minlength=3) / 20_000
    assert (hot - shares**2 / (shares**2).sum()).abs().max() < 5 * math.sqrt(0.25 / 20_000)
    assert sample(shares.log().expand(9, 3), top_k=1, generator=generator).tolist() == [0] * 9
    assert sample(shares.log().expand(9, 3), temperature=0).tolist() == [0] * 9


def test_a_repetition_penalty_lowers_what_came_before():
    logits, seen = torch.tensor([[2.0, -2.0, 1.0, 0.0]]), torch.tensor([[True, True, False, True]])
    assert penalise(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0, 0.0]]
    assert penalise(logits, seen, 0.5).tolist() == [[4.0, -1.0, 1.0, 0.0]]
    assert torch.equal(penalise(logits, seen, 1.0), logits)


def test_the_penalty_counts_the_tokens_of_a_row_alone_and_no_padding(model):
    prompts = [[3], [7, 1, 4, 1, 5, 9, 2]]
    together = torch.stack(list(generate(model, prompts, 15, temperature=0, repetition_penalty=1.5)), 1).tolist()
    for found, prompt in zip(together, prompts, strict=True):
        tokens = list(prompt)
        for _ in range(15):
            seen = torch.zeros(1, 11, dtype=torch.bool)
            seen[0, tokens] = True
            with torch.no_grad():
                logits = model(torch.tensor([tokens]))[:, -1]
            tokens.append(int(penalise(logits, seen, 1.5).argmax()))
        assert found == tokens[len(prompt) :]
        assert found != greedy(model, prompt, 15)


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.sets(st.integers(1, 29), max_size=9),
)
def test_text_ends_before_the_first_stop_string_however_it_comes(text, stops, cuts):
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = list(until((text[a:b] for a, b in itertools.pairwise(places)), stops))
    end = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    assert "".join(pieces) == text[:end]


def test_only_the_start_of_a_stop_string_is_held_back():
    assert [*until(["one", " t", "wo\n", "o", "ver", "s"], ["\nover", "never"])] == ["o", "ne t", "wo", "", ""]
    assert [*until(["one", " t", "wo\n", "o", "evr"], ["\nover", "never"])] == ["o", "ne t", "wo", "", "\noevr", ""]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one token"),
        ([[1], []], {}, "at least one token"),
        ([[1, 11]], {}, r"token id 11 is outside the model's vocabulary 0\.\.10"),
        ([[-1]], {}, "token id -1"),
        ([[1]], {"max_new_tokens": 0}, "max-new-tokens"),
        ([[1]], {"temperature": -0.1}, "temperature"),
        ([[1]], {"top_k": -1}, "top-k"),
        ([[1]], {"top_p": 1.1}, "top-p"),
        ([[1]], {"repetition_penalty": 0}, "repetition-penalty"),
        ([[1]], {"seed": 1 << 63}, r"seed must lie between 0 and 2\^63 - 1"),
    ],
)
def test_generation_refuses_what_does_not_fit_before_it_begins(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **{"max_new_tokens": 1} | options)


def test_prompts_may_be_arrays_tensors_or_bytes(model):
    wanted = [int(token) for token in generate(model, [[1, 2, 3]], 5)]
    for prompts in ([np.array([1, 2, 3])], torch.tensor([[1, 2, 3]]), [b"\x01\x02\x03"]):
        assert [int(token) for token in generate(model, prompts, 5)] == wanted
    with pytest.raises(TypeError):
        generate(model, [[1.5]], 1)  # pyrefly: ignore


def test_text_is_written_as_it_comes(bytes_run):
    heard: list[str] = []
    written = generate_run(bytes_run, "the cat é", 12, seed=4, write=heard.append)
    assert heard[0] == "the cat é"
    assert "".join(heard[1:]) == written.text
    assert written.tokens == 12
    assert written.tokens_per_second > 0
    assert generate_run(bytes_run, "the cat é", 12, seed=4).text == written.text


# Runs and what belongs together


def fake(config: RunConfig, lines: list[dict], folder: str = "run") -> Run:
    return Run(Path(folder), config, lines)


def test_the_states_of_a_run():
    config = preset("digits")
    val = [{"kind": "val", "step": s, "accuracy": a, "loss": 1.0} for s, a in ((10, 0.5), (20, 0.7), (30, 0.6))]
    end = {"kind": "end", "step": 30, "status": "done", "test": {"accuracy": 0.65, "loss": 1.1}, "seconds": 9.0}
    assert fake(config, val).status == "unfinished"
    assert fake(config, [*val, end]).status == "done"
    assert fake(config, [*val, end]).test == end["test"]
    assert fake(config, [*val, end | {"status": "stopped"}]).test is None
    assert fake(config, [*val, end | {"status": "stopped"}, val[2]]).status == "unfinished", "it goes on"
    best = fake(config, val).best
    assert best is not None
    assert best["step"] == 20
    assert (fake(config, [*val, end]).step, fake(config, [*val, end]).seconds) == (30, 9.0)
    assert (fake(config, []).best, fake(config, []).step, fake(config, []).status) == (None, 0, "unfinished")


def test_runs_that_differ_in_the_seed_alone_are_one_configuration():
    a = preset("digits")
    faster = replace(a, optim=replace(a.optim, lr=1e-2))
    elsewhere = replace(a, seed=1, out=Path("x"), train=replace(a.train, keep=5, log_every=3))
    groups = group([fake(run, []) for run in (replace(a, seed=2), faster, elsewhere, preset("image"))])
    assert [g.name for g in groups] == ["digits", "digits, optim.lr 0.01", "image"]
    assert [[run.config.seed for run in g.runs] for g in groups] == [[1, 2], [0], [0]]


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_of_a_run_makes_the_same_run(name):
    start = preset(name)
    changed = replace(
        start,
        seed=7,
        out=Path("some where/else"),
        model=replace(start.model, branches=(5,), squash=0.25, prenorm=start.model.mixer != "chela", branch_norm=True),
        data=replace(start.data, seed=3, root=Path("my data")),
        optim=replace(start.optim, betas=(0.8, 0.9), kernel_lr=1e-5),
        train=replace(start.train, time_limit="9m", deterministic=True, keep=1),
    )
    for config in (start, changed):
        words = shlex.split(command(config))
        assert words[:3] == ["chela", "train", name]
        assert _parsed(start, words[3:]) == config


def _parsed(start: RunConfig, words: list[str]) -> RunConfig:
    """What the command line makes of words, without training."""
    seen: list[RunConfig] = []

    class Caught(Exception):
        pass

    def catch(run: RunConfig) -> None:
        seen.append(run)
        raise Caught

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chela.training.train", catch)
        with pytest.raises(Caught):
            call(training(start), words, "chela train")
    return seen[0]


def test_the_command_of_settings_from_elsewhere():
    assert "no preset of this version" in command(RunConfig(preset="mine"))


def test_a_folder_without_its_files_is_no_run(tmp_path, digits_run):
    with pytest.raises(ValueError, match=r"is .* the folder of a run"):
        read_run(tmp_path)
    (tmp_path / "config.toml").write_text((digits_run / "config.toml").read_text())
    with pytest.raises(ValueError, match=r"metrics\.jsonl does not exist"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="has not reached its first validation"):
        load_run(tmp_path)


# Data and machine


def test_a_task_in_words(tmp_path):
    lines = describe_task(DataConfig(root=tmp_path)).splitlines()
    assert lines[1] == "  1,259 training, 179 validation, 359 test examples"
    assert lines[2] == "  64 steps of 1 real value(s)"
    assert lines[3].startswith("  10 classes in training: 0 9.8 %, 1 10.2 %, ")
    assert any("majority class: 10.03 %" in line for line in lines)
    assert lines[-1].startswith("  first training example, 64 steps, labelled 0: -0.81 ")


def test_what_lies_in_a_data_folder(tmp_path):
    assert inventory(tmp_path / "no") == [("root", f"{tmp_path / 'no'} does not exist yet")]
    for name in ("text", "prepared/listops-1", "prepared/half.1.tmp"):
        (tmp_path / name).mkdir(parents=True)
    assert dict(inventory(tmp_path)) == {"root": str(tmp_path), "given": "text/", "prepared": "listops-1/"}


def test_the_diagnosis_covers_every_part(tmp_path):
    rows = diagnose(tmp_path)
    parts = {part for part, _, _ in rows}
    assert {"versions", "devices", "implementations", "optional packages", "data"} <= parts
    found = {name: text for _, name, text in rows}
    assert found["torch"] == torch.__version__
    for op in WITH_TRITON:
        assert found[op].startswith(("reference", "triton")), found[op]


def test_data_without_preparation_touch_nothing(tmp_path):
    before = contents(tmp_path)
    diagnose(tmp_path)
    assert chela("data", "digits", "--root", tmp_path)[0] == 0
    assert contents(tmp_path) == before
    assert DataConfig().root == Path("~/.cache/chela")


def test_the_journal_is_what_evaluation_reads(digits_run):
    lines = [json.loads(line) for line in (digits_run / "metrics.jsonl").read_text().splitlines()]
    assert read_run(digits_run).journal == lines
