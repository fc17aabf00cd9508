"""A language model decodes online: the same numbers, at a cost that hardly grows with the context."""

from dataclasses import replace

import pytest
import torch

from chela.config import ModelConfig
from chela.evaluation.generate import generate
from chela.layers import LayerState
from chela.models import CausalLM, build
from chela.ops.long_conv.online import OnlineState
from chela.ops.testing import relative_error

LM = ModelConfig(
    kind="causal-lm", layers=2, vocab=20, d_model=16, d_ff=24, d_key=8, d_value=16, kernel_length=90, causal=True
)


def make(**changes) -> CausalLM:
    torch.manual_seed(0)
    model = build(replace(LM, **changes))
    assert isinstance(model, CausalLM)
    return model.eval().double()


@pytest.mark.parametrize("changes", [{}, {"kernel": "multiscale"}, {"short_width": 0}, {"branch_norm": True}])
@pytest.mark.parametrize("first", [1, 63, 200])
@torch.no_grad()
def test_a_model_decodes_online_as_in_one_forward(first, changes):
    model = make(**changes)
    model.merge()
    tokens = torch.randint(20, (2, 350))
    whole = model(tokens)
    _, plain = model.prefill(tokens[:, :first])
    state, kept = model.online(plain), plain.clone()
    assert all(
        isinstance(layer, LayerState) and isinstance(layer.convolution.long, OnlineState) for layer in state.layers
    )
    for position in range(first, 300):
        logits, state = model.step(tokens[:, position], state)
        assert relative_error(logits, whole[:, position]) < 1e-10
    assert all(torch.equal(a, b) for a, b in zip(plain.tensors(), kept.tensors(), strict=True)), "no memory is shared"
    copy, (row,) = state.clone(), state.select(torch.tensor([1])).to("cpu").layers[:1]
    assert isinstance(row, LayerState)
    assert row.convolution.long is not None
    more, _ = model.prefill(tokens[:, 300:], state=copy)
    assert relative_error(more, whole[:, 300:]) < 1e-10, "a longer piece goes on from an online state"
    assert state.batch_size == 2
    assert state.nbytes == copy.nbytes > 0


@torch.no_grad()
def test_padded_prompts_go_on_online_as_each_alone():
    model = make()
    model.merge()
    rows = [torch.randint(20, (n,)) for n in (100, 1, 37)]
    tokens = torch.stack([torch.nn.functional.pad(r, (100 - len(r), 0)) for r in rows])
    mask = torch.stack([torch.arange(100) >= 100 - len(r) for r in rows])
    following = torch.randint(20, (3, 150))
    state = model.online(model.prefill(tokens, mask)[1])
    for position in range(150):
        logits, state = model.step(following[:, position], state)
    for row, prompt in enumerate(rows):
        alone = model(torch.cat([prompt, following[row]])[None])[0, -1]
        assert relative_error(logits[row], alone) < 1e-10


def test_a_model_with_branches_says_that_it_must_be_merged():
    model = make()
    with torch.no_grad():
        _, state = model.prefill(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="merge"):
        model.online(state)
    with pytest.raises(ValueError, match="the state has 2 layers, the model 3"):
        make(layers=3).online(state)


def test_generation_is_online_once_merged_and_gives_the_same_tokens(monkeypatch):
    model, prompts = make(), [[1, 2, 3], [4] * 100]
    plain = torch.stack([*generate(model, prompts, 150, seed=3)])
    model.merge()
    made = []
    online = CausalLM.online
    monkeypatch.setattr(CausalLM, "online", lambda self, state, **room: made.append(1) or online(self, state, **room))
    assert torch.equal(torch.stack([*generate(model, prompts, 150, seed=3)]), plain)
    assert made
