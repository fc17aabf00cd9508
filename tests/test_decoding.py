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
@pytest.mark.parametrize("merged", [True, False])
def test_rows_are_taken_in_any_order_and_number(merged):
    model = make() if merged else CausalLM(CONFIG).double().eval()
    tokens = torch.randint(17, (3, 100))
    decoder, place = Decoder(model, model.prefill(tokens[:, :10])[1]), 10
    for rows in ([2, 0, 0], [1, 2], [0, 0, 1, 1]):
        tokens = tokens[rows]
        decoder.select(torch.tensor(rows))
        for _ in range(30):
            whole = model(tokens[:, : place + 1])[:, -1]
            assert_close(decoder.step(tokens[:, place]), whole, rtol=1e-9, atol=1e-9)
            place += 1
    assert decoder.state.batch_size == 4


@torch.no_grad()
def test_rows_of_a_recorded_step_are_taken_in_place_and_another_number_forgets_the_recording():
    model, tokens = make(), torch.randint(17, (3, 80))
    decoder = Decoder(model, model.prefill(tokens[:, :10])[1])
    for place in range(10, 75):
        decoder.step(tokens[:, place])
    decoder._graph = object()  # as on a GPU  # pyrefly: ignore
    before, places = decoder.state.clone(), [tensor.data_ptr() for tensor in decoder.state.tensors()]
    rows = torch.tensor([1, 1, 0])
    decoder.select(rows)
    assert [tensor.data_ptr() for tensor in decoder.state.tensors()] == places
    for one, two in zip(decoder.state.tensors(), before.select(rows).tensors(), strict=True):
        assert torch.equal(one, two)
    decoder.select(rows[:2])
    assert decoder._graph is None
    assert_close(decoder.step(tokens[[1, 1], 75]), model(tokens[[1, 1], :76])[:, -1], rtol=1e-9, atol=1e-9)


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
@pytest.mark.parametrize("impl", ["auto", "reference"])  # fused, and block by block
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_steps_on_a_gpu(dtype, impl):
    config = replace(CONFIG, d_model=64, d_ff=64, d_key=16, d_value=32, kernel_length=3000)
    model = make(config, torch.float32).cuda()
    tokens = torch.randint(17, (2, 2200), device="cuda")
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        _, state = model.prefill(tokens[:, :10])
        plain = Decoder(model, state.clone(), impl=impl, record=False)
        recorded = Decoder(model, state, impl=impl)
        assert (recorded._fused is None) == (impl == "reference")
        for place in range(10, 2200):  # over the end of two epochs of 1,024
            a, b = plain.step(tokens[:, place]), recorded.step(tokens[:, place])
            assert_close(
                a, b, rtol=1e-4 if dtype == torch.float32 else 3e-2, atol=1e-4 if dtype == torch.float32 else 3e-2
            )


@pytest.mark.gpu
@torch.no_grad()
def test_a_recording_outlives_the_autocast_it_was_made_in():
    model = make(replace(CONFIG, d_model=64, d_ff=64), torch.float32).cuda()
    tokens = torch.randint(17, (2, 40), device="cuda")
    autocast = torch.autocast("cuda", torch.bfloat16)
    with autocast:
        _, state = model.prefill(tokens[:, :10])
        plain = Decoder(model, state.clone(), impl="reference", record=False)
        recorded = Decoder(model, state, impl="reference")
        for decoder in (plain, recorded):
            decoder.step(tokens[:, 10])
    freed = [torch.full_like(p, torch.nan, dtype=torch.bfloat16) for p in model.parameters() for _ in range(4)]
    with autocast:
        for place in range(11, 40):
            assert_close(recorded.step(tokens[:, place]), plain.step(tokens[:, place]), rtol=3e-2, atol=3e-2)
    del freed
