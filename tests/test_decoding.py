"""Steps that a CUDA graph can hold: the same numbers as plain steps, states at addresses that stay."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from chela.config import ModelConfig
from chela.models import CausalLM
from chela.models.decoding import Decoder

CONFIG = ModelConfig(
    kind="causal-lm", causal=True, vocab=17, layers=2, d_model=12, d_ff=16, d_key=4, d_value=8, kernel_length=300
)


def make(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float64) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(config).to(dtype).eval()
    model.merge()
    return model


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"decay": True, "heads": 2}, {"attention": False}, {"short_width": 0}])
def test_decoder_gives_the_logits_of_the_whole_forward(changes):
    model = make(replace(CONFIG, **changes))
    tokens = torch.randint(17, (3, 190))
    whole = model(tokens)
    _, state = model.prefill(tokens[:, :20])
    decoder = Decoder(model, state)
    for place in range(20, 190):  # over the ends of two blocks of 64
        assert_close(decoder.step(tokens[:, place]), whole[:, place], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_what_a_graph_holds_stays_where_it_is_and_gives_the_same():
    model = make()
    tokens = torch.randint(17, (2, 160))
    _, state = model.prefill(tokens[:, :10])
    plain, held = Decoder(model, state.clone()), Decoder(model, state)
    held._token = torch.zeros(2, dtype=torch.int64)
    places = [tensor.data_ptr() for tensor in held._state.tensors()]
    for place in range(10, 160):
        held._token.copy_(tokens[:, place])
        logits = held._emit(held._state)
        held._advance()
        assert_close(logits, plain.step(tokens[:, place]), rtol=1e-12, atol=1e-12)
    assert [tensor.data_ptr() for tensor in held._state.tensors()] == places
    for one, two in zip(held._state.tensors(), plain._state.tensors(), strict=True):
        assert_close(one, two, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_an_unmerged_model_and_a_baseline_step_plainly():
    torch.manual_seed(0)
    transformer = ModelConfig(
        kind="causal-lm", causal=True, vocab=17, mixer="transformer", d_model=16, heads=2, layers=2
    )
    for config in (CONFIG, transformer):
        model = CausalLM(config).double().eval()
        tokens = torch.randint(17, (2, 40))
        whole = model(tokens)
        _, state = model.prefill(tokens[:, :5])
        decoder = Decoder(model, state)
        for place in range(5, 40):
            assert_close(decoder.step(tokens[:, place]), whole[:, place], rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_steps_on_a_gpu(dtype):
    config = replace(CONFIG, d_model=64, d_ff=64, d_key=16, d_value=32, kernel_length=3000)
    model = make(config, torch.float32).cuda()
    tokens = torch.randint(17, (2, 2200), device="cuda")
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        _, state = model.prefill(tokens[:, :10])
        plain, recorded = Decoder(model, state.clone()), Decoder(model, state)
        plain._recorded = False
        for place in range(10, 2200):  # over the end of two epochs of 1,024
            a, b = plain.step(tokens[:, place]), recorded.step(tokens[:, place])
            assert_close(
                a, b, rtol=1e-4 if dtype == torch.float32 else 3e-2, atol=1e-4 if dtype == torch.float32 else 3e-2
            )
