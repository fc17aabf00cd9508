"""The whole forward = prefill in pieces and steps, whatever computes either, at the level of the model."""

import itertools

import pytest
import torch

from chela.config import ModelConfig
from chela.models import CausalLM
from chela.models.decoding import Decoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = ModelConfig(
    kind="causal-lm", causal=True, vocab=17, layers=2, d_model=16, d_ff=32, d_key=16, d_value=16, heads=2,
    decay=True, kernel_length=24, feed_forward="swiglu", branches=(), dropout=0.0,
)  # fmt: skip


@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(low, marks=pytest.mark.gpu) for low in (torch.float16, torch.bfloat16))]
)
@pytest.mark.parametrize(
    ("prefill", "steps"),
    [
        ("triton", "triton"),
        ("triton", "reference"),
        pytest.param("reference", "triton", marks=pytest.mark.gpu),  # half a minute in the interpreter
        ("reference", "reference"),
    ],
)
@torch.no_grad()
def test_pieces_and_steps_of_all_implementations_equal_the_whole_forward(prefill, steps, dtype):
    torch.manual_seed(0)
    model = CausalLM(CONFIG).to(DEVICE).eval()
    model.merge()
    tokens = torch.randint(17, (2, 40), device=DEVICE)  # past the kernel's 24 taps
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        state, found = None, []
        for start, stop in itertools.pairwise([0, 1, 9, 30]):
            logits, state = model.prefill(tokens[:, start:stop], state=state, impl=prefill)
            found.append(logits.float())
        assert state is not None
        decoder = Decoder(model, state, impl=steps)
        found += [decoder.step(t).to(torch.float32, copy=True).unsqueeze(1) for t in tokens[:, 30:].unbind(1)]
        plain = model(tokens, impl="reference").float()
    exact = model.double()(tokens, impl="reference")
    scale = float(exact.abs().max())
    error, off = float((torch.cat(found, 1) - exact).abs().max()), float((plain - exact).abs().max())
    assert error <= (1e-5 * scale if dtype == torch.float32 else 2 * (off + torch.finfo(dtype).eps * scale))
