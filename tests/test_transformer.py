"""The Transformer that CHELA is measured against, and the layer of flash-linear-attention."""

import itertools
import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from chela.config import ModelConfig
from chela.evaluation.generate import generate
from chela.models import build, load_model, save_model
from chela.models.transformer import RotaryAttention, rotate

SMALL = ModelConfig(
    kind="causal-lm", causal=True, mixer="transformer", layers=2, d_model=16, d_ff=24, heads=2, norm="rms", vocab=20
)


def make(**changes) -> Any:
    torch.manual_seed(1)
    return build(replace(SMALL, **changes)).eval().double()


def relative(actual, expected):
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def test_the_numbers_are_those_of_the_equations():
    """One block written out, a position at a time."""
    model = make(layers=1)
    block, d, h = model.backbone.blocks[0], 16, 8
    for parameter in model.parameters():  # the start is too small to show a mistake
        torch.nn.init.normal_(parameter, std=0.5)
    tokens = torch.randint(20, (1, 9))
    x = model.backbone.embedding(tokens)[0]  # [T, D]

    def rms(v, norm):
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    def turned(v, position):  # [8], pairs (i, i + 4)
        out = torch.empty_like(v)
        for i in range(4):
            angle = torch.tensor(position * 10_000 ** (-i / 4), dtype=torch.float64)
            out[i] = v[i] * angle.cos() - v[i + 4] * angle.sin()
            out[i + 4] = v[i] * angle.sin() + v[i + 4] * angle.cos()
        return out

    q, k, v = (rms(x, block.mixer_norm) @ block.mixer.qkv.weight.T).split(d, dim=-1)
    rows = []
    for t in range(9):
        heads = []
        for part in (slice(0, h), slice(h, d)):
            scores = [turned(q[t, part], t) @ turned(k[s, part], s) / h**0.5 for s in range(t + 1)]
            heads.append(torch.stack(scores).softmax(0) @ v[: t + 1, part])
        rows.append(x[t] + torch.cat(heads) @ block.mixer.out.weight.T)
    x = torch.stack(rows)
    gate, up = (rms(x, block.feed_forward_norm) @ block.feed_forward.gate_up.weight.T).split(24, dim=-1)
    x = x + (F.silu(gate) * up) @ block.feed_forward.down.weight.T
    expected = rms(x, model.backbone.last_norm) @ model.head.weight.T + model.head.bias
    assert relative(model(tokens)[0], expected) < 1e-12


def test_rotary_positions_are_relative():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 2, 8, dtype=torch.float64)
    scores = [(rotate(q, t + 5) * rotate(k, t)).sum(-1) for t in (0, 3, 1000)]
    for score in scores[1:]:
        torch.testing.assert_close(score, scores[0], rtol=1e-10, atol=1e-10)
    assert relative((rotate(q, 6) * rotate(k, 0)).sum(-1), scores[0]) > 1e-3


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("cuts", [(1,), (5, 6), (63,), (1, 2, 40)])
def test_prefill_in_pieces_and_steps_equal_the_full_forward(cuts, online):
    model = make()
    tokens = torch.randint(20, (3, 150))
    with torch.no_grad():
        whole, state, pieces = model(tokens), None, []
        for start, stop in itertools.pairwise([0, *cuts]):
            logits, state = model.prefill(tokens[:, start:stop], state=state)
            pieces.append(logits)
        state = model.online(state) if online else state
        for position in range(cuts[-1], 150):  # past the first room for keys, and the second
            logits, state = model.step(tokens[:, position], state)
            pieces.append(logits.unsqueeze(1))
    assert relative(torch.cat(pieces, 1), whole) < 1e-12


def test_a_plain_state_stays_as_it_was_and_a_clone_of_an_online_one_too():
    model = make()
    with torch.no_grad():
        _, state = model.prefill(torch.randint(20, (2, 5)))
        first, second = torch.tensor([3, 4]), torch.tensor([5, 6])
        for start in (state, model.online(state)):
            kept = start.clone()
            wanted, _ = model.step(first, start)
            model.step(second, start)
            assert torch.equal(model.step(first, kept)[0], wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model = make()
    lengths = [20, 1, 9]
    tokens, mask = torch.zeros(3, 20, dtype=torch.long), torch.zeros(3, 20, dtype=torch.bool)
    rows = [torch.randint(20, (n,)) for n in lengths]
    for row, content in enumerate(rows):
        place = slice(0, len(content)) if side == "right" else slice(20 - len(content), 20)
        tokens[row, place], mask[row, place] = content, True
    following = torch.randint(20, (3,))
    forward, (logits, state) = model(tokens, mask), model.prefill(tokens, mask)
    after, _ = model.step(following, state)
    online, _ = model.step(following, model.online(state.detach()))
    swapped, _ = model.step(following.flip(0), state.select(torch.tensor([2, 1, 0])))
    for row, content in enumerate(rows):
        alone, alone_state = model.prefill(content.unsqueeze(0))
        assert relative(forward[row, mask[row]], alone[0]) < 1e-12
        assert relative(logits[row, mask[row]], alone[0]) < 1e-12
        expected = model.step(following[row : row + 1], alone_state)[0][0]
        for continued in (after[row], online[row], swapped[2 - row]):
            assert relative(continued, expected) < 1e-12
    forward.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_packed_documents_equal_each_alone_forward_and_backward():
    model, tokens = make(), torch.randint(20, (1, 40))
    packed = model(tokens, cu_seqlens=torch.tensor([0, 7, 7, 40], dtype=torch.int32))
    alone = torch.cat([model(tokens[:, :7]), model(tokens[:, 7:])], 1)
    assert relative(packed, alone) < 1e-12
    weight = torch.randn_like(packed)
    gradients = (torch.autograd.grad((out * weight).sum(), model.parameters()) for out in (packed, alone))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_future_has_no_influence():
    model, tokens = make(), torch.randint(20, (1, 30))
    changed = tokens.clone()
    changed[:, 17:] = (changed[:, 17:] + 1) % 20
    before, after = model(tokens), model(changed)
    assert relative(before[:, :17], after[:, :17]) < 1e-14
    assert relative(before[:, 17:], after[:, 17:]) > 1e-3


def test_a_state_refuses_what_cannot_stand_before_it():
    layer = RotaryAttention(8, heads=2)
    x, mask, ends = torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool), torch.tensor([0, 3], dtype=torch.int32)
    _, state = layer(x, return_state=True)
    for options in ({"mask": mask}, {"cu_seqlens": ends}):
        with pytest.raises(ValueError, match="exclude state"):
            layer(x, state=state, **options)
    with pytest.raises(ValueError, match="leave no state"):
        layer(x, cu_seqlens=ends, return_state=True)
    with pytest.raises(ValueError, match="not an even number a head"):
        RotaryAttention(10, heads=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "classifier"}, "causal-lm alone"),
        ({"prenorm": False}, r"model\.prenorm true"),
        ({"heads": 3}, "must be a multiple of twice"),
    ],
)
def test_settings_a_baseline_does_not_take(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, d_value=6, **changes)


def test_compiled_it_gives_the_same_numbers_at_every_length():
    model = make()
    for block in model.backbone.blocks:
        block.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9, 14):
        tokens = torch.randint(20, (2, length))
        with torch.compiler.set_stance("force_eager"):
            expected = model(tokens)
        assert relative(model(tokens), expected) < 1e-12


def test_greedy_generation_is_the_argmax_of_the_full_forward():
    model = make()
    model.merge()
    prompts = [[1, 2, 3], [7]]
    written = torch.stack(list(generate(model, prompts, 90, temperature=0)), 1)  # more than the first room
    for prompt, row in zip(prompts, written, strict=True):
        tokens = torch.tensor([[*prompt, *row.tolist()]])
        with torch.no_grad():
            expected = model(tokens)[0, len(prompt) - 1 : -1].argmax(-1)
        assert torch.equal(row, expected)


def test_weights_go_to_disk_and_back(tmp_path):
    model = build(SMALL).eval()
    save_model(model, tmp_path / "model.safetensors")
    tokens = torch.randint(20, (1, 12))
    assert torch.equal(load_model(tmp_path / "model.safetensors", SMALL)(tokens), model(tokens))


def test_the_start_is_that_of_gpt_2():
    torch.manual_seed(0)
    model = build(replace(SMALL, d_model=64, heads=2, d_ff=128, vocab=200, layers=8))
    for name, parameter in model.named_parameters():
        narrow = name.endswith(("out.weight", "down.weight"))
        if parameter.ndim == 2:
            assert float(parameter.detach().std()) == pytest.approx(0.02 / (4 if narrow else 1), rel=0.05), name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, 0.0 if name.endswith("bias") else 1.0)), name


def test_gla_says_what_is_missing():
    if find_spec("fla"):
        pytest.skip("flash-linear-attention is installed")
    with pytest.raises(ValueError, match="needs the package flash-linear-attention"):
        build(replace(SMALL, mixer="gla"))


def test_gla_says_what_its_layers_miss(tmp_path, monkeypatch):
    package = tmp_path / "fla" / "layers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=r"a_package_that_nobody_has is missing.*pip install"):
        build(replace(SMALL, mixer="gla"))
    for name in ("fla", "fla.layers"):
        sys.modules.pop(name, None)


@pytest.mark.gpu
def test_gla_is_causal_and_learns_and_keeps_no_state():
    pytest.importorskip("fla.layers", exc_type=ImportError)
    model = build(replace(SMALL, mixer="gla", d_model=128)).cuda()
    tokens = torch.randint(20, (2, 100), device="cuda")
    changed = tokens.clone()
    changed[:, 60:] = (changed[:, 60:] + 1) % 20
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(model(tokens)[:, :60], model(changed)[:, :60])
        model.loss(tokens, tokens)[0].backward()  # pyrefly: ignore
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    with pytest.raises(ValueError, match="does not generate"):
        model.prefill(tokens)  # pyrefly: ignore
