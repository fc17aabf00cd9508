"""Loss and accuracy, in training and evaluation alike: sums and counts, added up over batches and processes."""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela.config import ModelConfig
from chela.data import Batch, Split
from chela.models import CausalLM, ChelaState
from chela.training import distributed

Kind = Literal["classifier", "two-tower", "causal-lm"]
IGNORED = -100


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a batch: [B, classes], or [B, T, vocab] of a language model."""
    if batch.second is not None:
        return model(batch.inputs, batch.second, batch.mask, batch.second_mask)
    if batch.cu_seqlens is not None:
        return model(batch.inputs, batch.mask, batch.cu_seqlens)
    return model(batch.inputs, batch.mask)


def score(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy (nats, at least float32) and number of hits over all labels that count.

    With `smoothing` that share of each label is spread evenly over all classes (Szegedy et al. 2016).
    """
    logits, labels = logits.flatten(0, -2), labels.flatten()
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED, label_smoothing=smoothing)
    return loss, (logits.detach().argmax(-1) == labels).sum()


def loss_and_hits(
    model: nn.Module, batch: Batch, state: ChelaState | None = None, smoothing: float = 0.0
) -> tuple[Tensor, Tensor, ChelaState | None]:
    """Sum of the loss and number of hits of a batch; a language model's logits never all lie in memory.

    With a state, a language model reads on from it, and the state after the batch comes third. `smoothing` is that of
    `score`, for classifiers.
    """
    if isinstance(model, CausalLM):
        assert not smoothing
        carry = {"state": state, "return_state": state is not None}
        return model.loss(batch.inputs, batch.labels, batch.mask, batch.cu_seqlens, **carry)
    assert state is None
    return *score(forward(model, batch), batch.labels, smoothing), None


def outputs(model: nn.Module) -> int:
    """How many answers a model chooses among: symbols or classes."""
    config = model.config
    assert isinstance(config, ModelConfig)
    return config.vocab if config.kind == "causal-lm" else config.classes


def targets(batch: Batch) -> int:
    """Labels that count: examples, or the tokens a language model predicts."""
    return int((batch.labels != IGNORED).sum())


def check_labels(batch: Batch, classes: int) -> None:
    """Refuse labels that the model has no output for; `batch` is still on the CPU.

    Raises:
        ValueError: a label is neither in 0..classes-1 nor "no target".
    """
    wrong = batch.labels[(batch.labels != IGNORED) & ((batch.labels < 0) | (batch.labels >= classes))]
    if wrong.numel():
        raise ValueError(f"the data have label {int(wrong[0])}, but the model's outputs are 0..{classes - 1}")


def check_tokens(batch: Batch, vocab: int) -> None:
    """Refuse tokens that the model has no embedding for, while `batch` is still on the CPU: a GPU would not say which.

    Raises:
        ValueError: a token id is not in 0..vocab-1.
    """
    for tokens in (batch.inputs, batch.second):
        if tokens is not None and not tokens.is_floating_point():
            wrong = tokens[(tokens < 0) | (tokens >= vocab)]
            if wrong.numel():
                raise ValueError(f"token id {int(wrong[0])} is outside the model's vocabulary 0..{vocab - 1}")


def evaluate(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    kind: Kind = "classifier",
    examples: int = 0,
) -> dict[str, float]:
    """Evaluate a model on a split, in whole batches dealt out to the processes.

    Args:
        model: the model itself (not wrapped for data parallelism), on `device`; its mode is restored.
        split: the examples.
        batch_size: examples a forward pass.
        device: where to compute.
        dtype: compute type; bfloat16 runs under autocast.
        kind: a language model's result has perplexity besides and, where it is known what the tokens stand for,
            bits_per_byte and (where the field counts words) word_perplexity.
        examples: look at this many, evenly spread over the split; 0 takes all.

    Returns:
        loss (mean, nats), accuracy, count (labels), and for a language model perplexity (of a token), bits_per_byte
        (all nats by the bytes of the labels, by ln 2) and word_perplexity (e to the nats by the bytes, times the bytes
        a word of the split).
    """
    chosen = np.arange(len(split))
    if 0 < examples < len(split):
        chosen = np.arange(examples) * len(split) // examples
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    count = covered = 0
    measure = getattr(split, "text", None)
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for start in range(distributed.rank() * batch_size, len(chosen), distributed.size() * batch_size):
            batch = split.batch(chosen[start : start + batch_size])
            count += targets(batch)
            covered += measure.covered(batch.labels) if measure else 0
            check_labels(batch, outputs(model))
            loss, hits, _ = loss_and_hits(model, batch.to(device))
            sums += torch.stack([loss.double(), hits.double()])
    model.train(was_training)
    loss, hits = distributed.sum_over_ranks(sums).tolist()
    count, covered = distributed.sum_over_ranks(torch.tensor([count, covered])).tolist()
    result = {"loss": loss / max(count, 1), "accuracy": hits / max(count, 1), "count": count}
    if kind == "causal-lm":
        result["perplexity"] = math.exp(min(result["loss"], 700.0))
        if measure is not None and covered:
            result["bits_per_byte"] = loss / covered / math.log(2)
            if measure.words:
                result["word_perplexity"] = math.exp(min(loss / covered * measure.bytes / measure.words, 700.0))
        elif outputs(model) == 256:
            result["bits_per_byte"] = result["loss"] / math.log(2)
    return result


def better(new: dict[str, float], old: dict[str, float] | None, kind: Kind) -> bool:
    """Whether a validation beats the best so far: a language model by loss, others by accuracy, then loss."""
    if old is None:
        return True
    if kind == "causal-lm":
        return new["loss"] < old["loss"]
    return (new["accuracy"], -new["loss"]) > (old["accuracy"], -old["loss"])


def text(result: dict[str, float]) -> str:
    """A result in a few words."""
    if "bits_per_byte" in result:
        words = f", word perplexity {result['word_perplexity']:.2f}" if "word_perplexity" in result else ""
        return f"{result['bits_per_byte']:.4f} bits per byte{words}"
    if "perplexity" in result:
        return f"perplexity {result['perplexity']:.2f}"
    return f"accuracy {100 * result['accuracy']:.2f} %, loss {result['loss']:.4f}"
