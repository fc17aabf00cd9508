"""A whole step in few launches: the numbers of the blocks as they are, states that either can go on from."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from chela.config import ModelConfig
from chela.models import CausalLM
from chela.models.decoding import Decoder
from chela.models.fused_step import fused_step
from chela.ops import decoding

pytest.importorskip("triton")
from chela.ops.decoding import cached_kernels, kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # a CPU runs Triton's interpreter
CHELA = ModelConfig(
    kind="causal-lm", causal=True, vocab=17, layers=2, d_model=20, d_ff=24, d_key=6, d_value=12, kernel_length=300
)
TRANSFORMER = ModelConfig(
    kind="causal-lm", causal=True, vocab=17, layers=2, mixer="transformer", d_model=20, d_ff=24, heads=2, norm="rms"
)
MODELS = {
    "layer norm": CHELA,
    "rms norm, heads with decay, SwiGLU": replace(CHELA, norm="rms", heads=2, decay=True, feed_forward="swiglu"),
    "scale norm, branch norm, bounded SwiGLU": replace(
        CHELA, norm="scale", branch_norm=True, attention_norm="none", feed_forward="bounded-swiglu"
    ),
    "no feed-forward part, wide": replace(CHELA, d_ff=0, d_model=70, short_width=1),
    "Transformer": TRANSFORMER,
    "Transformer without a feed-forward part": replace(TRANSFORMER, d_ff=0, norm="layer"),
}


def places(config: ModelConfig) -> tuple[int, int]:
    """Where steps begin and end; a Transformer's go from one share of 64 keys to two."""
    return (10, 16) if config.mixer == "chela" else (60, 66)


def make(config: ModelConfig) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(config).eval()
    for name, parameter in model.named_parameters():  # gains and biases at their start would hide a mistake
        if parameter.ndim == 1 or name.endswith(("gain", "bias")):
            torch.nn.init.normal_(parameter, 0.5 if name.endswith(("gain", "weight")) else 0, 0.3)
        elif config.mixer == "transformer":
            torch.nn.init.normal_(parameter, std=0.2)
    model.merge()
    return model.to(DEVICE)


def draw(rows: int, length: int = 80) -> torch.Tensor:
    return torch.randint(17, (rows, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def written(model: CausalLM, tokens: torch.Tensor, *, mask: torch.Tensor | None = None, **options) -> torch.Tensor:
    """Logits of the last places by steps, the first by a prefill."""
    first, end = places(model.config)
    _, state = model.prefill(tokens[:, :first], mask)
    decoder = Decoder(model, state, **options)
    assert (decoder._fused is None) == (options.get("impl") == "reference")
    # a recorded step overwrites its logits
    steps = [decoder.step(token).to(torch.float32, copy=True) for token in tokens[:, first:end].unbind(1)]
    return torch.stack(steps, 1)


def budget(plain: torch.Tensor, exact: torch.Tensor, eps: float) -> float:
    """Twice what the plain steps are off, and a rounding of the largest (see `chela.ops.testing`)."""
    return 2 * (float((plain - exact).abs().max()) + eps * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_it_gives_the_logits_of_the_whole_forward(config, dtype, nan_memory):
    model, tokens, (first, end) = make(config), draw(2), places(config)
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        fused = written(model, tokens, impl="triton")
        plain = written(model, tokens, impl="reference")
    exact = model.double().cpu()(tokens.cpu())[:, first:end].to(DEVICE)
    assert float((fused - exact).abs().max()) <= budget(plain, exact, torch.finfo(dtype).eps)


@torch.no_grad()
def test_a_head_too_large_for_the_registers_is_taken_in_parts(monkeypatch, nan_memory):
    monkeypatch.setattr(decoding, "HEAD_PART", 64)
    test_it_gives_the_logits_of_the_whole_forward(CHELA, torch.float32, None)  # 6 rows of 12 numbers: by four


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["none", "silu", "swiglu", "bounded-swiglu"])
@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 70, 300), (3, 2100, 34), (decoding.FEW_ROWS + 1, 16, 6)])
def test_products_of_few_rows_and_of_more(rows, width, outputs, activation, dtype, nan_memory):
    x, weight = torch.randn(rows, width).to(DEVICE, dtype), torch.randn(outputs, width) * width**-0.5
    weight = weight.to(DEVICE, dtype)
    for bias in (None, torch.randn(outputs).to(DEVICE, dtype)):
        exact, plain = (
            F.linear(x.to(kind), weight.to(kind), None if bias is None else bias.to(kind))
            for kind in (torch.float64, dtype)
        )
        if activation == "silu":
            exact, plain = F.silu(exact), F.silu(plain)
        elif activation == "swiglu":
            exact, plain = (F.silu(y[:, : outputs // 2]) * y[:, outputs // 2 :] for y in (exact, plain))
        elif activation == "bounded-swiglu":
            exact, plain = (F.silu(y[:, : outputs // 2]) * y[:, outputs // 2 :].tanh() for y in (exact, plain))
        found = decoding.product(x, weight, bias, activation)
        assert found.dtype == dtype
        assert float((found - exact).abs().max()) <= budget(plain, exact, torch.finfo(dtype).eps)


@pytest.mark.parametrize("config", [CHELA, TRANSFORMER], ids=["chela", "Transformer"])
@torch.no_grad()
def test_padded_prompts_go_on_as_each_alone(config):
    model, tokens, (first, end) = make(config), draw(3), places(config)
    begins = (0, first - 1, 7)
    mask = torch.arange(first, device=DEVICE) >= torch.tensor(begins, device=DEVICE).unsqueeze(1)
    together = written(model, tokens, mask=mask, impl="triton")
    for row, begin in enumerate(begins):
        alone = model(tokens[row : row + 1, begin:end], impl="reference")[0, first - begin :]
        assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [CHELA, TRANSFORMER], ids=["chela", "Transformer"])
@torch.no_grad()
def test_its_state_goes_on_by_plain_steps_and_rows_are_taken(config):
    model, tokens = make(config), draw(3)
    decoder = Decoder(model, model.prefill(tokens[:, :10])[1], impl="triton", room=7)
    for place in range(10, 20):  # a Transformer's room is full after 7, then doubles
        decoder.step(tokens[:, place])
    plain, _ = model.step(tokens[:, 20], decoder.state.clone(), impl="reference")
    assert_close(decoder.step(tokens[:, 20]), plain, rtol=1e-4, atol=1e-5)
    rows = torch.tensor([2, 0], device=DEVICE)
    decoder.select(rows)
    whole = model(tokens[rows, :22], impl="reference")
    assert_close(decoder.step(tokens[rows, 21]), whole[:, -1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_ends_of_blocks_of_the_long_convolution(monkeypatch):
    monkeypatch.setattr(decoding, "FEW_ROWS", 0)  # for the interpreter's sake: cuBLAS's part, as for many rows
    model, tokens = make(replace(CHELA, layers=1)), draw(1)
    whole = model(tokens, impl="reference")
    decoder = Decoder(model, model.prefill(tokens[:, :5])[1], impl="triton")
    for place in range(5, 75):
        assert_close(decoder.step(tokens[:, place]), whole[:, place], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@torch.no_grad()
def test_a_transformer_goes_back(impl):
    model, tokens = make(TRANSFORMER), draw(2)
    decoder = Decoder(model, model.prefill(tokens[:, :10])[1], impl=impl)
    first = [decoder.step(tokens[:, place]).clone() for place in range(10, 14)]
    decoder.rewind(4)
    for place, logits in enumerate(first, 10):
        assert torch.equal(decoder.step(tokens[:, place]), logits)
    with pytest.raises(ValueError, match="cannot forget 30"):
        decoder.rewind(30)
    model = make(CHELA)
    with pytest.raises(ValueError, match="keep a clone"):
        Decoder(model, model.prefill(tokens)[1]).rewind(1)


@pytest.mark.parametrize(
    "changes",
    [
        {"prenorm": False},
        {"attention": False},
        {"attention_norm": "sum"},
        {"short_width": 0},
        {"kernel_length": 0},
        {"d_key": 200, "d_value": 300},
    ],
)
@torch.no_grad()
def test_blocks_of_other_forms_step_as_they_are(changes):
    model, tokens = make(replace(CHELA, **changes)), draw(1)[:, :5]
    state = model.online(model.prefill(tokens)[1])
    assert fused_step(model, state, "triton") is None
    model = make(CHELA)
    state = model.online(model.prefill(tokens)[1])
    assert fused_step(model, state, "triton") is not None
    assert fused_step(model, state, "reference") is None
    assert fused_step(model.double(), state, "triton") is None


class Launches(TorchDispatchMode):
    """Counts operations that make numbers, and kernels instead of running them."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        for module, names in ((kernels, "add_norm convolve attend gate product swiglu"),
                              (cached_kernels, "place partial combine")):  # fmt: skip
            for name in names.split():
                monkeypatch.setattr(module, name, self)

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options):
        self.count += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = "view slice t transpose unsqueeze squeeze expand detach alias empty new_empty empty_like"
        self.count += func.overloadpacket.__name__ not in views.split()
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("config", "few", "many"), [(CHELA, 8, 9), (TRANSFORMER, 9, 10)], ids=["chela", "Transformer"])
@torch.no_grad()
def test_launches_of_a_block(config, few, many, monkeypatch):
    counts = {}
    for rows in (1, decoding.FEW_ROWS + 1):
        for layers in (1, 2):
            model, tokens = make(replace(config, layers=layers)), draw(rows)
            decoder = Decoder(model, model.prefill(tokens[:, :10], impl="reference")[1], impl="triton")
            with monkeypatch.context() as patch, Launches(patch) as launches:
                decoder._token = tokens[:, 10]
                decoder._emit(decoder._state)
            counts[rows, layers] = launches.count
        assert counts[rows, 2] - counts[rows, 1] == (few if rows == 1 else many)
        assert counts[rows, 1] <= counts[rows, 2] / 2 + 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_recorded_it_gives_the_same_numbers(config, dtype):
    model, tokens = make(config), draw(3, 300)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        _, state = model.prefill(tokens[:, :20])
        recorded, launched = (Decoder(model, state.clone(), room=100, impl="triton") for _ in range(2))
        for place in range(20, 300):  # a Transformer's room is full after 100: recorded again
            found = recorded.step(tokens[:, place]).clone()
            assert recorded._graph is not None
            launched._make_room()
            launched._token = tokens[:, place]
            expected = launched._emit(launched._state)
            launched._advance()
            assert torch.equal(found, expected)
