"""Exported graphs (`torch.export`) give the model's numbers at any size, and need no chela to run."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from chela.config import ModelConfig
from chela.models import build
from chela.models.export import empty_state, export_forward, export_step, full_state
from chela.ops.linear_attention import reference
from chela.ops.testing import relative_error

LM = ModelConfig(
    kind="causal-lm", layers=2, vocab=20, d_model=16, d_ff=24, d_key=8, d_value=16, kernel_length=90, causal=True
)
CLASSIFIER = replace(LM, kind="classifier", causal=False, classes=5)

MODELS = {
    "language model": LM,
    "multiscale, decay, two heads": replace(LM, kernel="multiscale", decay=True, heads=2),
    "merged, branch norm, sum": replace(LM, merged=True, branch_norm=True, attention_norm="sum"),
    "few lags, post-norm": replace(LM, kernel_length=9, prenorm=False, norm="rms"),
    "no attention": replace(LM, attention=False, d_ff=0),
    "no convolution": replace(LM, kernel_length=0, short_width=0),
    "classifier": CLASSIFIER,
    "real, query, batch norm": replace(CLASSIFIER, inputs="real", channels=2, pooling="query", norm="batch"),
    "first, causal": replace(CLASSIFIER, causal=True, pooling="first"),
    "last, merged": replace(CLASSIFIER, merged=True, pooling="last"),
}


def make(config: ModelConfig) -> Any:
    torch.manual_seed(1)
    return build(config).eval()


def batch(config: ModelConfig, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, and a mask of which every row has at least one real position."""
    inputs = torch.randint(20, (rows, length))
    if config.inputs == "real":
        inputs = torch.randn(rows, length, config.channels)
    real = torch.randint(1, length + 1, (rows,))
    return inputs, torch.arange(length) >= length - real[:, None]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_forward_is_that_of_the_model_for_any_batch_and_length(name):
    model = make(MODELS[name])
    graph = export_forward(model)
    assert not [node for node in graph.graph.nodes if "chela" in str(node.target)], "torch's own operations alone"
    run = graph.module()
    lengths = [1, 2, 7, 63, 64, 65, 90] + [300] * (model.config.kind == "causal-lm")
    for rows, length in [(1, 70), *((3, length) for length in lengths)]:
        inputs, mask = batch(model.config, rows, length)
        found, wanted = run(inputs, mask), model(inputs, mask)
        if model.config.kind == "causal-lm":
            found, wanted = found[mask], wanted[mask]
        assert found.shape == wanted.shape
        assert relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize("name", [name for name, config in MODELS.items() if config.kind == "causal-lm"])
@torch.no_grad()
def test_a_step_is_that_of_the_model_for_any_batch(name):
    model = make(MODELS[name])
    graph = export_step(model)
    assert not [node for node in graph.graph.nodes if "chela" in str(node.target)]
    step = graph.module()
    for rows in (1, 3):
        tokens = torch.randint(20, (rows, 120))  # past the kernel's 90 taps
        whole = model(tokens)
        state, pieces = empty_state(model, rows).tensors(), []
        shapes = [tensor.shape for tensor in state]
        for position in range(120):
            logits, state = step(tokens[:, position], state)
            pieces.append(logits)
        assert [tensor.shape for tensor in state] == shapes
        assert relative_error(torch.stack(pieces, 1), whole) < 1e-5


@torch.no_grad()
def test_a_step_goes_on_after_a_prefill():
    model = make(LM)
    tokens = torch.randint(20, (2, 31))
    state = full_state(model, model.prefill(tokens[:, :30])[1])
    logits, _ = export_step(model).module()(tokens[:, 30], state.tensors())
    assert relative_error(logits, model(tokens)[:, -1]) < 1e-5


def test_saved_graphs_run_without_chela(tmp_path):
    model = make(LM)
    tokens, mask = batch(LM, 3, 40)
    torch.export.save(export_forward(model), tmp_path / "forward.pt2")
    torch.export.save(export_step(model), tmp_path / "step.pt2")
    torch.save([tokens, mask, empty_state(model, 3).tensors()], tmp_path / "inputs")
    script = f"""if True:
        import sys, torch
        sys.modules["chela"] = None  # an import of it would fail
        tokens, mask, state = torch.load({str(tmp_path / "inputs")!r})
        whole = torch.export.load({str(tmp_path / "forward.pt2")!r}).module()(tokens, mask)
        step = torch.export.load({str(tmp_path / "step.pt2")!r}).module()
        logits, state = step(tokens[:, 0], state)
        torch.save([whole, logits], {str(tmp_path / "outputs")!r})"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, logits = torch.load(tmp_path / "outputs")
    with torch.no_grad():
        assert relative_error(whole[mask], model(tokens, mask)[mask]) < 1e-5
        assert relative_error(logits, model(tokens[:, :1])[:, 0]) < 1e-5


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 128, 300])
@pytest.mark.parametrize("decayed", [False, True])
@pytest.mark.parametrize("carried", [False, True])
def test_the_exported_form_of_attention_is_the_recurrence(length, decayed, carried):
    q, k = torch.randn(2, 2, length, 3, 4, dtype=torch.float64)
    v = torch.randn(2, length, 3, 5, dtype=torch.float64)
    state = torch.randn(2, 3, 4, 5, dtype=torch.float64) if carried else None
    decay = torch.tensor([0.02, 0.9, 1.0], dtype=torch.float64) if decayed else None
    found, wanted = (f(q, k, v, state, decay) for f in (reference.any_length, reference.recurrent))
    for ours, definition in zip(found, wanted, strict=True):
        assert relative_error(ours, definition) < 1e-12


def test_what_is_not_exported_is_said():
    with pytest.raises(ValueError, match="only a Classifier or CausalLM is exported, got a TwoTowerClassifier"):
        export_forward(make(replace(CLASSIFIER, kind="two-tower")))
    with pytest.raises(ValueError, match="only a CausalLM is exported, got a Classifier"):
        export_step(make(CLASSIFIER))
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        export_forward(make(LM).train())
    with pytest.raises(ValueError, match="not those of transformer"):
        export_forward(make(replace(LM, mixer="transformer", norm="rms", heads=2)))
    model = make(replace(LM, merged=True))
    with torch.no_grad(), pytest.raises(ValueError, match="take one of prefill or step"):
        full_state(model, model.online(model.prefill(torch.zeros(1, 3, dtype=torch.long))[1]))
