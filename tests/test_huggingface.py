"""CHELA in transformers: the numbers of chela's own models, through their classes, files, generation and Trainer."""

import copy
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import chela
from chela.config import DataConfig, ModelConfig, RunConfig
from chela.data import digits
from chela.evaluation.generate import generate
from chela.models import build, load_model, save_model
from chela.ops.testing import relative_error
from chela.record import load_toml, save_toml
from cli_kit import chela as command  # pyrefly: ignore
from cli_kit import succeed, train_bytes, train_digits, write_texts  # pyrefly: ignore

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers", reason="needs the extra hf")

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    Trainer,
    TrainingArguments,
    logging,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from chela.models.hf import (
    ChelaCache,
    ChelaConfig,
    ChelaForCausalLM,
    ChelaForSequenceClassification,
    ChelaModel,
    byte_tokenizer,
    register,
    run_tokenizer,
)

LM = ModelConfig(
    kind="causal-lm", layers=2, vocab=20, d_model=16, d_ff=24, d_key=8, d_value=16, kernel_length=48, causal=True
)
CLASSIFIER = replace(LM, kind="classifier", causal=False, classes=3)
VARIANTS = {
    "plain": {},
    "multiscale, decay": {"kernel": "multiscale", "decay": True, "heads": 2},
    "branch norm, sum": {"branch_norm": True, "attention_norm": "sum", "norm": "rms"},
    "merged": {"merged": True},
    "merged, multiscale": {"merged": True, "kernel": "multiscale"},
}
TRANSFORMER = {"mixer": "transformer", "norm": "rms", "heads": 2}

register()
logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*words):
        raise AssertionError("a test reaches for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def make_lm(**changes) -> Any:
    torch.manual_seed(1)
    return ChelaForCausalLM(ChelaConfig.of(replace(LM, **changes))).eval()


def left_padded(prompts: list[list[int]], pad: int = 3) -> dict[str, torch.Tensor]:
    """Prompts as a batch, with a token of the vocabulary as padding."""
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(p)) + p for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def make_prompts(*lengths: int) -> list[list[int]]:
    return [torch.randint(20, (n,)).tolist() for n in lengths]


# Config and files


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_config_holds_the_settings_of_a_model_and_comes_back_from_its_file(changes, tmp_path):
    for config in (replace(LM, **changes), replace(CLASSIFIER, **changes | {"decay": False})):
        kind: Any = config.kind
        theirs = ChelaConfig.of(config)
        assert theirs.settings(kind) == config
        theirs.save_pretrained(tmp_path)
        again = AutoConfig.from_pretrained(tmp_path)
        assert type(again) is ChelaConfig
        assert again.settings(kind) == config


def test_a_config_has_the_defaults_of_chela_and_knows_the_names_of_transformers():
    assert ChelaConfig().settings("classifier") == replace(ModelConfig(), classes=2)
    config = ChelaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=3, heads=2, num_labels=7)
    assert (config.vocab, config.d_model, config.layers, config.num_attention_heads) == (300, 32, 3, 2)
    assert config.settings("classifier").classes == config.num_labels == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_modle": 3}, r"unknown key d_modle \(did you mean 'd_model'\?\)"),
        ({"heads": 3}, "model.d_value 256 is not a multiple of model.heads 3"),
        ({"d_model": "wide"}, "model.d_model must be int, got 'wide'"),
        ({"norm": "group"}, "model.norm must be one of layer, rms, scale, batch; got 'group'"),
        ({"num_labels": 1}, "model.classes must be at least 2, got 1"),
        ({"tie_word_embeddings": True}, "a head of its own"),
    ],
)
def test_mistakes_in_a_config_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ChelaConfig(**settings)


def test_a_baseline_is_a_language_model_and_has_a_body(tmp_path):
    model = make_lm(**TRANSFORMER)
    model.save_pretrained(tmp_path)
    tokens = torch.randint(20, (2, 9))
    body = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(body(tokens).last_hidden_state, model.chela.backbone(tokens)[0])
    with pytest.raises(ValueError, match=r"mixer transformer is for model\.kind causal-lm alone"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_language_model_is_causal():
    with pytest.raises(ValueError, match=r"a language model is causal: set model\.causal true"):
        ChelaForCausalLM(ChelaConfig())


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_weights_have_their_names_under_one_prefix_and_come_back_bit_by_bit(changes, tmp_path, nan_memory):
    tokens = torch.randint(20, (2, 30))
    for kind, auto in (("causal-lm", AutoModelForCausalLM), ("classifier", AutoModelForSequenceClassification)):
        config = replace(LM, kind=kind, classes=3, **changes)
        ours = build(config)
        theirs = auto.from_config(ChelaConfig.of(config)).eval()
        assert list(theirs.state_dict()) == [f"chela.{name}" for name in ours.state_dict()]
        theirs.save_pretrained(tmp_path / kind)
        files = {path.name for path in (tmp_path / kind).iterdir()}
        assert files - {"generation_config.json"} == {"config.json", "model.safetensors"}
        assert "auto_map" not in json.loads((tmp_path / kind / "config.json").read_text())
        again = auto.from_pretrained(tmp_path / kind)
        assert type(again) is type(theirs)
        assert not again.training
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
        body = AutoModel.from_pretrained(tmp_path / kind)
        assert type(body) is ChelaModel
        assert torch.equal(body(tokens).last_hidden_state, theirs.chela.backbone(tokens)[0])


def test_a_new_model_is_drawn_as_chela_draws_it():
    torch.manual_seed(5)
    ours = build(LM).state_dict()
    torch.manual_seed(5)
    theirs = AutoModelForCausalLM.from_config(ChelaConfig.of(LM))
    assert all(torch.equal(value, theirs.state_dict()[f"chela.{name}"]) for name, value in ours.items())


def test_a_head_that_a_checkpoint_lacks_is_drawn_and_the_rest_is_read(tmp_path, nan_memory):
    lm = make_lm(kernel="multiscale")
    lm.save_pretrained(tmp_path)
    words = {"num_labels": 5, "pooling": "query", "ignore_mismatched_sizes": True}
    model: Any = ChelaForSequenceClassification.from_pretrained(tmp_path, **words)
    head = model.chela.head.weight
    assert head.shape == (5, 16)
    assert 0.5 * 16**-0.5 < head.abs().max() <= 16**-0.5, "nn.Linear's uniform start"
    assert torch.equal(model.chela.pooling.query, torch.zeros(16))
    for name, value in lm.chela.backbone.state_dict().items():
        assert torch.equal(model.chela.backbone.state_dict()[name], value)


def test_without_register_the_auto_classes_do_not_know_chela(tmp_path):
    make_lm().save_pretrained(tmp_path)
    script = f"""if True:
        from transformers import AutoModelForCausalLM
        import chela.models
        try:
            AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
        except ValueError as error:
            assert "chela" in str(error), error
        else:
            raise AssertionError("known before register()")
        from chela.models.hf import register
        register()
        register()
        print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "ChelaForCausalLM\n", done.stderr


def test_one_package_alone_imports_transformers():
    source = Path(chela.__file__).parent
    pattern = re.compile(r"^\s*(from|import) (transformers|tokenizers|accelerate)\b", re.MULTILINE)
    found = {p.parent for p in source.rglob("*.py") if pattern.search(p.read_text(encoding="utf-8"))}
    assert source / "models" / "hf" in found
    assert {p for p in found if "data" not in p.parts} == {source / "models" / "hf"}  # data may train tokenizers


def test_half_precision(tmp_path):
    lm, tokens = make_lm(kernel="multiscale", decay=True), torch.randint(20, (2, 30))
    lm.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = {name.split(".")[-1] for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert wide == {"taps", "scale", "decay_logit"}, "kernels and decays stay in float32"
    assert half.chela.head.weight.dtype == half.dtype == torch.bfloat16
    logits = half(tokens).logits
    assert logits.dtype == torch.bfloat16
    assert relative_error(logits.float(), lm(tokens).logits) < 0.05, "sixteen roundings of 2^-9 and their growth"
    assert half.generate(tokens, max_new_tokens=5, do_sample=False).shape == (2, 35)


def test_the_vocabulary_grows(tmp_path):
    lm, tokens = make_lm(), torch.randint(20, (2, 9))
    before = lm(tokens).logits
    lm.resize_token_embeddings(23, mean_resizing=False)
    after = lm(torch.cat([tokens, torch.tensor([[22], [20]])], 1)).logits
    assert after.shape == (2, 10, 23)
    torch.testing.assert_close(after[:, :9, :20], before)
    assert lm.chela.config.vocab == lm.chela.backbone.config.vocab == lm.config.vocab_size == 23
    lm.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).chela.head.out_features == 23


# Runs of chela


@pytest.fixture(scope="module")
def bytes_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("bytes")
    write_texts(root)
    train_bytes(root / "run", root)
    return root / "run"


def test_a_run_goes_to_transformers_and_back(bytes_run, tmp_path):
    model = ChelaForCausalLM.from_run(bytes_run)
    own = load_model(bytes_run / "model.safetensors")
    tokens = torch.randint(256, (1, 20))
    assert torch.equal(model(tokens).logits, own(tokens))
    model.save_pretrained(tmp_path / "hf")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    back.save_run(tmp_path / "back", load_toml(bytes_run / "config.toml"))
    for name, value in load_model(tmp_path / "back" / "model.safetensors").state_dict().items():
        assert torch.equal(value, own.state_dict()[name])
    assert succeed("eval", tmp_path / "back") == succeed("eval", bytes_run)
    words = ("--prompt", "the cat", "--max-new-tokens", 9)
    assert command("generate", tmp_path / "back", *words)[1] == command("generate", bytes_run, *words)[1]
    with pytest.raises(ValueError, match="holds a run already: name another folder"):
        model.save_run(tmp_path / "back")


def test_a_run_of_another_kind_or_none_is_refused(bytes_run, tmp_path):
    with pytest.raises(ValueError, match="holds a causal-lm, but ChelaForSequenceClassification is a classifier"):
        ChelaForSequenceClassification.from_run(bytes_run)
    with pytest.raises(ValueError, match=r"is .* the folder of a run"):
        ChelaForCausalLM.from_run(tmp_path)


def test_a_classifier_run_reads_real_values(tmp_path):
    train_digits(tmp_path / "run")
    model = ChelaForSequenceClassification.from_run(tmp_path / "run")
    values = torch.randn(2, 64, 1)
    own = load_model(tmp_path / "run" / "model.safetensors")
    assert torch.equal(model(input_values=values).logits, own(values))
    with pytest.raises(ValueError, match="this model reads real: pass input_values alone"):
        model(torch.zeros(2, 64, dtype=torch.long))


def test_a_run_with_a_tokenizer_of_its_own(tmp_path):
    """Its tokens are the tokenizer's, `generate` stops behind a document, and both come back."""
    from chela.data.tokenizer import load_coder, train_tokenizer

    text = "the cat sat on the mat. the dog ate the cat's hat. " * 20
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json").write_text(train_tokenizer([text.encode()], 300))
    tokenizer = run_tokenizer(tmp_path / "run")
    assert len(tokenizer(text)["input_ids"]) < len(text) / 3
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    config = replace(LM, vocab=len(tokenizer))
    save_model(build(config), tmp_path / "run" / "model.safetensors")
    save_toml(RunConfig(model=config), tmp_path / "run" / "config.toml")
    model: Any = ChelaForCausalLM.from_run(tmp_path / "run")
    end = tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == end == 0
    with torch.no_grad():
        model.chela.head.bias[end] += 100
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=9).tolist() == [[5, 6, 0]]
    model.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config.eos_token_id == end
    back: Any = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert back(text)["input_ids"] == tokenizer(text)["input_ids"]
    model.save_run(tmp_path / "back", tokenizer=back)
    assert load_coder(tmp_path / "back", config.vocab).encode(text.encode()).tolist() == back(text)["input_ids"]
    (tmp_path / "run" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        run_tokenizer(tmp_path / "run")


# Generation


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("cached", [True, False])
def test_greedy_generation_is_chelas_own_and_the_argmax_of_the_full_forward(changes, cached):
    model, prompts = make_lm(**changes), make_prompts(9, 9)
    count = 60 if cached else 20  # 60: past the kernel's 48 taps
    tokens = model.generate(torch.tensor(prompts), max_new_tokens=count, do_sample=False, use_cache=cached)
    own = torch.stack([*generate(model.chela, prompts, count, temperature=0)], 1)
    assert torch.equal(tokens[:, 9:], own)
    with torch.no_grad():
        assert torch.equal(model.chela(tokens)[:, 8:-1].argmax(-1), own), "each token the likeliest after those before"


@pytest.mark.parametrize("changes", [{"decay": True}, {"merged": True}, TRANSFORMER, TRANSFORMER | {"merged": True}])
def test_a_left_padded_batch_continues_as_each_prompt_alone(changes):
    model, prompts = make_lm(**changes), make_prompts(40, 1, 17)
    asked = {"max_new_tokens": 30, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    together = model.generate(**left_padded(prompts), **asked)
    own = torch.stack([*generate(model.chela, prompts, 30, temperature=0)], 1)
    for row, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), **asked)
        assert torch.equal(together.sequences[row, 40:], alone.sequences[0, len(prompt) :])
        assert torch.equal(together.sequences[row, 40:], own[row])
        theirs, ones = (torch.stack([step[r] for step in out.logits]) for out, r in ((together, row), (alone, 0)))
        assert relative_error(theirs, ones) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"merged": True}, TRANSFORMER, TRANSFORMER | {"merged": True}])
def test_beam_search_reorders_the_cache(changes):
    model, prompts = make_lm(**changes), make_prompts(12, 5)
    asked = {"max_new_tokens": 20, "num_beams": 4, "num_return_sequences": 2, "do_sample": False}
    together = model.generate(**left_padded(prompts), **asked)
    assert torch.equal(together, model.generate(**left_padded(prompts), **asked, use_cache=False))
    alone = model.generate(torch.tensor(prompts[1:]), **asked)
    assert torch.equal(together[2:, 12:], alone[:, 5:])
    greedy = model.generate(**left_padded(prompts), max_new_tokens=20, do_sample=False)
    assert not torch.equal(together[::2], greedy), "beams found something likelier"


def test_sampling_follows_the_seed_with_a_cache_and_without():
    model, prompts = make_lm(), torch.tensor(make_prompts(9, 9))

    def draw(seed: int, **words: Any) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.generate(prompts, max_new_tokens=15, do_sample=True, top_k=10, temperature=0.7, **words)

    assert torch.equal(draw(0), draw(0))
    assert torch.equal(draw(0), draw(0, use_cache=False))
    assert not torch.equal(draw(0), draw(1))


def test_repetition_penalty_is_theirs():
    model, prompts = make_lm(), make_prompts(9, 9)
    theirs = model.generate(torch.tensor(prompts), max_new_tokens=40, do_sample=False, repetition_penalty=1.3)
    own = torch.stack([*generate(model.chela, prompts, 40, temperature=0, repetition_penalty=1.3)], 1)
    assert torch.equal(theirs[:, 9:], own)
    assert not torch.equal(own, torch.stack([*generate(model.chela, prompts, 40, temperature=0)], 1))


def test_a_cache_goes_on_where_it_was_left():
    model, prompt = make_lm(), torch.tensor(make_prompts(30))
    asked = {"do_sample": False, "return_dict_in_generate": True}
    whole = model.generate(prompt, max_new_tokens=20, **asked).sequences
    first = model.generate(prompt, max_new_tokens=8, **asked)
    cache = first.past_key_values
    assert isinstance(cache, ChelaCache)
    assert cache.get_seq_length() == 37, "the last token has not been read yet"
    kept = copy.deepcopy(cache)
    for again in (cache, kept):
        rest = model.generate(first.sequences, max_new_tokens=12, past_key_values=again, **asked)
        assert torch.equal(rest.sequences, whole)
    pieces = model.generate(prompt, max_new_tokens=20, prefill_chunk_size=7, **asked)
    assert torch.equal(pieces.sequences, whole)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"merged": True}, TRANSFORMER | {"merged": True}])
def test_a_copied_cache_holds_no_model_and_logits_stay_as_they_were(changes):
    model, tokens = make_lm(**changes), torch.randint(20, (2, 30))
    full = model(tokens, use_cache=False).logits
    cache = ChelaCache()
    model(tokens[:, :5], past_key_values=cache)
    logits = [model(tokens[:, place : place + 1], past_key_values=cache).logits for place in range(5, 20)]
    kept = copy.deepcopy(cache)
    logits += [model(tokens[:, place : place + 1], past_key_values=cache).logits for place in range(20, 30)]
    assert relative_error(torch.cat(logits, 1), full[:, 5:]) < 1e-5
    assert (kept.get_seq_length(), cache.get_seq_length()) == (20, 30)
    assert kept._decoder is None
    for place in range(20, 30):
        again = model(tokens[:, place : place + 1], past_key_values=kept, impl="reference").logits
        assert relative_error(again, full[:, place : place + 1]) < 1e-5
    twice = copy.deepcopy(kept)
    twice.batch_repeat_interleave(2)
    assert twice.batch_size == 4


@pytest.mark.gpu
@torch.no_grad()
def test_generate_on_a_gpu_replays_recorded_steps():
    model, prompts = make_lm(merged=True).cuda(), make_prompts(40, 1, 17)
    batch = {name: value.cuda() for name, value in left_padded(prompts).items()}
    out = model.generate(**batch, max_new_tokens=100, do_sample=False, return_dict_in_generate=True)
    assert out.past_key_values._decoder._graph is not None
    own = torch.stack([*generate(model.chela, prompts, 100, temperature=0)], 1)
    assert torch.equal(out.sequences[:, 40:].cpu(), own)
    asked = {"max_new_tokens": 40, "num_beams": 4, "do_sample": False}
    beams = model.generate(**batch, **asked)
    model.hf_device_map = {"here": 0, "there": 1}  # as if on several GPUs: nothing is recorded
    assert torch.equal(model.generate(**batch, **asked), beams)


def test_a_forward_with_a_cache_is_the_full_forward():
    model, tokens = make_lm(), torch.randint(20, (2, 40))
    with torch.no_grad():
        full = model(tokens, use_cache=False)
        assert full.past_key_values is None
        out = model(tokens[:, :25])
        assert out.past_key_values.batch_size == 2
        more = model(tokens[:, 25:], past_key_values=out.past_key_values, attention_mask=torch.ones(2, 40))
    assert more.past_key_values is out.past_key_values
    assert relative_error(torch.cat([out.logits, more.logits], 1), full.logits) < 1e-5
    assert torch.equal(model(tokens, logits_to_keep=3, use_cache=False).logits, full.logits[:, -3:])
    assert isinstance(model(tokens, use_cache=False, return_dict=False), tuple)
    more.past_key_values.reset()
    assert relative_error(model(tokens, past_key_values=out.past_key_values).logits, full.logits) < 1e-5


def test_padding_on_either_side_does_not_count():
    model, rows = make_lm(), make_prompts(30, 11)
    batch = left_padded(rows)
    flipped = {
        "input_ids": torch.tensor([rows[0], rows[1] + [3] * 19]),
        "attention_mask": batch["attention_mask"].flip(1),
    }
    alone = model(torch.tensor(rows[1:])).logits[0]
    for use_cache in (True, False):
        assert relative_error(model(**batch, use_cache=use_cache).logits[1, 19:], alone) < 1e-5
        assert relative_error(model(**flipped, use_cache=use_cache).logits[1, :11], alone) < 1e-5


def test_what_a_cache_cannot_do_is_said():
    model, prompt = make_lm(), torch.tensor(make_prompts(9))
    with pytest.raises(ValueError, match="the cache of a CHELA model is a ChelaCache, got a DynamicCache"):
        model(prompt, past_key_values=DynamicCache())
    cache = model(prompt).past_key_values
    with pytest.raises(ValueError, match="padding cannot stand between a cache and its tokens"):
        model(prompt[:, :2], past_key_values=cache, attention_mask=torch.tensor([[1] * 9 + [0, 1]]))
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, T\] = \[1, 9\]; got \[1, 1, 9, 9\]"):
        model(prompt, attention_mask=torch.ones(1, 1, 9, 9))
    with pytest.raises(ValueError, match="cu_seqlens and a cache exclude each other"):
        model(prompt, use_cache=True, cu_seqlens=torch.tensor([0, 9], dtype=torch.int32))
    with pytest.raises(ValueError, match="cache_implementation is 'static': a CHELA model has one cache"):
        model.generate(prompt, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="cannot go back over tokens"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(prompt, max_new_tokens=2, assistant_model=make_lm())
    with pytest.raises(ValueError, match="temperatures"):
        model.generate(prompt, max_new_tokens=2, temperatures=2.0)
    with pytest.raises(ValueError, match="token id 20 is outside the model's vocabulary"):
        model.generate(torch.tensor([[20]]), max_new_tokens=2)


# Tokenizer and pipeline


def test_the_byte_tokenizer_is_utf8(tmp_path):
    tokenizer = byte_tokenizer()
    text = "héllo ☃\n\x00  two, 'll  \t€"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert sorted(tokenizer.get_vocab().values()) == [*range(256)]
    tokenizer.save_pretrained(tmp_path)
    again: Any = AutoTokenizer.from_pretrained(tmp_path)
    batch = again(["a", "bcd"], padding=True)
    assert batch["input_ids"] == [[0, 0, 97], [98, 99, 100]]
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]


def test_a_pipeline_writes_text(bytes_run):
    model, prompts = ChelaForCausalLM.from_run(bytes_run), ["the cat", "on"]
    write = pipeline("text-generation", model=model, tokenizer=byte_tokenizer(), device="cpu")
    written = write(prompts, batch_size=2, max_new_tokens=12, do_sample=False)
    for prompt, [found] in zip(prompts, written, strict=True):
        own = bytes(int(token) for token in generate(model.chela, [list(prompt.encode())], 12, temperature=0))
        assert found["generated_text"] == prompt + own.decode(errors="replace")


def test_stop_strings_and_streams_are_those_of_transformers():
    model, tokenizer = make_lm(vocab=256), byte_tokenizer()
    with torch.no_grad():
        model.chela.head.bias[97:123] += 100  # it writes small letters
    prompt = tokenizer("the cat", return_tensors="pt")

    class Heard(BaseStreamer):
        tokens: ClassVar[list[int]] = []

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            self.tokens.append(-1)

    whole = model.generate(**prompt, max_new_tokens=30, do_sample=False, streamer=Heard())
    assert Heard.tokens == [*whole[0].tolist(), -1]
    text = str(tokenizer.decode(whole[0, 7:]))
    stop = text[5:7]
    ended = model.generate(**prompt, max_new_tokens=30, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    assert torch.equal(ended[0], whole[0, : ended.shape[1]])
    assert ended.shape[1] == 7 + text.index(stop) + 2 < 37


# Training


def test_labels_give_the_loss_of_the_next_token():
    model, tokens = make_lm(), torch.randint(20, (2, 12))
    labels = tokens.masked_fill(torch.rand(2, 12) < 0.3, -100)
    out = model(tokens, labels=labels)
    assert out.past_key_values is None, "training keeps no state"
    wanted = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, wanted)
    count = int((labels[:, 1:] >= 0).sum())
    torch.testing.assert_close(model(tokens, labels=labels, num_items_in_batch=2 * count).loss, wanted / 2)
    packed = model(tokens.view(1, 24), cu_seqlens=torch.tensor([0, 12, 24], dtype=torch.int32)).logits
    assert relative_error(packed.view(2, 12, 20), out.logits) < 1e-5


def test_gradient_checkpointing_gives_the_same_gradients():
    tokens, found = torch.randint(20, (2, 30)), []
    for checkpointed in (False, True):
        model = make_lm().double().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing == model.chela.backbone.checkpoint_blocks == checkpointed
        model(tokens, labels=tokens).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-12, atol=1e-14)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    with pytest.raises(ValueError, match="leave options out"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_labels_give_the_loss_of_a_class():
    model = ChelaForSequenceClassification(ChelaConfig.of(CLASSIFIER))
    batch, labels = left_padded(make_prompts(20, 6)), torch.tensor([2, 0])
    out = model(**batch, labels=labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))
    assert relative_error(out.logits[1:], model(batch["input_ids"][1:, 14:]).logits) < 1e-5
    several = ChelaForSequenceClassification(ChelaConfig.of(CLASSIFIER))
    marks = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    out = several(**batch, labels=marks)
    torch.testing.assert_close(out.loss, F.binary_cross_entropy_with_logits(out.logits, marks))


def test_trainer_learns_digits_in_one_epoch(tmp_path):
    task = digits.load(DataConfig())

    def examples(split):
        batch = split.batch(np.arange(len(split)))
        return [{"input_values": x, "labels": y} for x, y in zip(batch.inputs, batch.labels, strict=True)]

    def accuracy_of(found: Any) -> dict[str, float]:
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    shape: dict[str, Any] = {"layers": 2, "d_model": 32, "d_ff": 64, "d_key": 16, "d_value": 32, "kernel_length": 64}
    config = ChelaConfig(inputs="real", pooling="first", num_labels=10, **shape)
    trainer = Trainer(
        ChelaForSequenceClassification(config),
        TrainingArguments(
            str(tmp_path),
            num_train_epochs=1,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        ),
        train_dataset=examples(task.train),
        eval_dataset=examples(task.test),
        compute_metrics=accuracy_of,
    )
    trainer.train()
    assert trainer.state.epoch == 1
    accuracy = trainer.evaluate()["eval_accuracy"]
    assert accuracy > 0.6, "a constant answer has 0.10"
    trainer.save_model(str(tmp_path / "best"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "best")
    batch = task.test.batch(np.arange(len(task.test)))
    found = again(input_values=batch.inputs).logits.argmax(-1)
    assert float((found == batch.labels).double().mean()) == pytest.approx(accuracy)


def test_trainer_accumulates_slices_to_the_same_step(tmp_path):
    """Rows with unlike numbers of labels: only the sum over all slices, divided once, gives the batch's loss."""
    tokens = torch.randint(20, (8, 16))
    keep = torch.arange(16) < torch.tensor([3, 16, 5, 9, 2, 16, 7, 4])[:, None]
    rows = [{"input_ids": t, "labels": t.masked_fill(~k, -100)} for t, k in zip(tokens, keep, strict=True)]
    after = []
    for slices in (1, 4):
        model = make_lm(dropout=0.0).double().train()
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=8 // slices,
            gradient_accumulation_steps=slices,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
        )
        Trainer(model, arguments, train_dataset=rows).train()
        after.append(model.state_dict())
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, rtol=1e-8, atol=1e-10)
