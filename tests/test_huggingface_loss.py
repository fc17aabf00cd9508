"""The loss of `ChelaForCausalLM` in training, without logits: the numbers of the loss from them, in less memory."""

import os
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from chela.config import ModelConfig
from chela.models.chunked_loss import SLICE
from test_chunked_loss import Watch, saved_bytes  # pyrefly: ignore

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers", reason="needs the extra hf")

from transformers import Trainer, TrainingArguments

from chela.models.hf import ChelaConfig, ChelaForCausalLM


def make(vocab: int = 20, **changes: Any) -> Any:
    torch.manual_seed(1)
    shape: dict[str, Any] = {"layers": 1, "d_model": 8, "d_ff": 0, "d_key": 4, "d_value": 8, "kernel_length": 16}
    config = ModelConfig(kind="causal-lm", causal=True, vocab=vocab, **shape | changes)
    return ChelaForCausalLM(ChelaConfig.of(config)).double().train()


def some_labels(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.masked_fill(torch.rand(tokens.shape) < 0.3, -100)


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("case", ["plain", "left-padded", "counted", "counted by a tensor", "packed", "transformer"])
def test_loss_and_gradients_in_training_are_those_of_the_loss_from_logits(case):
    changes: dict[str, Any] = {"mixer": "transformer", "heads": 2, "d_ff": 8} if case == "transformer" else {}
    model = make(**changes)
    tokens = torch.randint(20, (1, 24) if case == "packed" else (3, 15))
    words: dict[str, Any] = {"labels": some_labels(tokens)}
    if case == "left-padded":
        words["attention_mask"] = torch.arange(15) >= torch.tensor([0, 4, 9])[:, None]
        words["labels"][~words["attention_mask"]] = -100
    if case.startswith("counted"):
        words["num_items_in_batch"] = torch.tensor(17) if "tensor" in case else 17
    if case == "packed":
        words["cu_seqlens"] = torch.tensor([0, 11, 24], dtype=torch.int32)
    short, whole = model(tokens, **words), model(tokens, **words, skip_logits=False)
    assert short.logits is None
    assert short.past_key_values is None
    assert whole.logits.shape == (*tokens.shape, 20)
    torch.testing.assert_close(short.loss.double(), whole.loss.double(), rtol=1e-6, atol=0)  # theirs is in float32
    if "count" not in case:
        wanted = F.cross_entropy(whole.logits[:, :-1].flatten(0, 1), words["labels"][:, 1:].flatten())
        torch.testing.assert_close(short.loss, wanted, rtol=1e-12, atol=0)
    again = gradients(model, whole.loss)
    for name, value in gradients(model, short.loss).items():
        torch.testing.assert_close(value, again[name], rtol=1e-5, atol=1e-5 * float(again[name].abs().max()))


def test_evaluation_and_a_call_without_labels_have_logits():
    model, tokens = make(), torch.randint(20, (2, 9))
    assert model(tokens).logits.shape == (2, 9, 20), "in training, without labels"
    short = model(tokens, labels=tokens, return_dict=False)
    assert len(short) == 1, "a tuple holds what is there: the loss"
    model.eval()
    whole = model(tokens, labels=tokens)
    assert whole.logits.shape == (2, 9, 20)
    torch.testing.assert_close(whole.loss.double(), short[0], rtol=1e-6, atol=0)
    assert model(tokens, labels=tokens, skip_logits=True).logits is None


def test_a_head_or_loss_of_someone_elses_is_not_passed_by():
    tokens = torch.randint(20, (2, 9))

    class Adapted(nn.Linear):
        """A head with something added, as adapters do."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    adapted = make()
    head = Adapted(8, 20).double()
    head.load_state_dict(adapted.chela.head.state_dict())
    adapted.set_output_embeddings(head)
    hooked = make()
    hooked.chela.head.register_forward_hook(lambda module, inputs, output: output * 2)
    other = make()
    other.loss_function = lambda logits, labels, **words: logits.sum() * 0 + 42
    losses = [model(tokens, labels=tokens).loss for model in (adapted, hooked, other)]
    torch.testing.assert_close(losses[0], losses[1])
    assert abs(losses[0] - make()(tokens, labels=tokens).loss) > 1e-3
    assert losses[2] == 42
    for model in (adapted, hooked, other):
        with pytest.raises(ValueError, match="the model's own head and loss function"):
            model(tokens, labels=tokens, skip_logits=True)


def test_logits_that_are_needed_are_not_skipped():
    model, tokens = make(), torch.randint(20, (2, 9))
    assert model(tokens, labels=tokens, use_cache=True).logits is not None
    for words in ({}, {"labels": tokens, "use_cache": True}):
        with pytest.raises(ValueError, match="skip_logits needs labels, no cache"):
            model(tokens, **words, skip_logits=True)


def test_neither_the_work_nor_what_is_kept_grows_with_positions_times_vocabulary():
    length, vocab = 1024, 32768
    assert length * vocab == 2 * SLICE
    model, tokens = make(vocab).float(), torch.randint(vocab, (1, length))
    with Watch() as watch:
        model(tokens, labels=tokens).loss.backward()
    assert watch.elements <= SLICE
    short = saved_bytes(lambda: model(tokens, labels=tokens).loss)
    whole = saved_bytes(lambda: model(tokens, labels=tokens, skip_logits=False).loss)
    assert whole - short >= 4 * length * vocab - 2 * 4 * vocab * 9, "logits of 4 bytes less the gradient of the head"
    assert short < 4 * length * vocab / 8


def test_trainer_trains_and_evaluates_with_logits_for_the_metrics(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(20, (4, 12))]
    seen = []

    def metrics(found: Any) -> dict[str, float]:
        seen.append(found.predictions.shape)
        return {}

    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True)
    trainer = Trainer(make().float(), arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics)
    assert 0 < trainer.train().training_loss < 10
    assert 0 < trainer.evaluate()["eval_loss"] < 10
    assert seen == [(4, 12, 20)]
