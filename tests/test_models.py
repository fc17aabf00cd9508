import itertools
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from chela.config import ModelConfig
from chela.models import CausalLM, Classifier, TwoTowerClassifier, build, load_model, save_model
from chela.models.backbone import Embedding
from test_chunked_loss import Watch  # pyrefly: ignore

SMALL = ModelConfig(
    layers=2, d_model=16, d_ff=24, d_key=8, d_value=16, vocab=20, classes=5, kernel_length=48, branches=(3, 7)
)
LM = replace(SMALL, kind="causal-lm", causal=True, pooling="mean")


def make(config) -> Any:
    torch.manual_seed(1)
    return build(config).eval()


def relative(actual, expected):
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def test_build_makes_the_kind_asked_for():
    assert type(make(SMALL)) is Classifier
    assert type(make(replace(SMALL, kind="two-tower"))) is TwoTowerClassifier
    assert type(make(LM)) is CausalLM


@pytest.mark.parametrize("pooling", ["mean", "first", "last", "query"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("changes", [{}, {"prenorm": False}, {"inputs": "real", "channels": 2}, {"causal": True}])
def test_padding_does_not_change_a_class(pooling, side, changes):
    model = make(replace(SMALL, pooling=pooling, **changes)).double()
    lengths = [30, 1, 17]
    if model.config.inputs == "tokens":
        rows = [torch.randint(20, (n,)) for n in lengths]
        inputs = torch.full((3, 30), 3)
    else:
        rows = [torch.randn(n, 2, dtype=torch.float64) for n in lengths]
        inputs = torch.full((3, 30, 2), 9.0, dtype=torch.float64)
    mask = torch.zeros(3, 30, dtype=torch.bool)
    for row, content in enumerate(rows):
        place = slice(0, len(content)) if side == "right" else slice(30 - len(content), 30)
        inputs[row, place], mask[row, place] = content, True
    together = model(inputs, mask)
    for row, content in enumerate(rows):
        assert relative(together[row], model(content.unsqueeze(0))[0]) < 1e-10


def test_two_towers_see_both_sides_and_share_weights():
    model = make(replace(SMALL, kind="two-tower")).double()
    a, b = torch.randint(20, (2, 30)), torch.randint(20, (2, 11))
    assert model(a, b).shape == (2, 5)
    assert relative(model(a, b), model(b, a)) > 1e-3
    mask = torch.ones(2, 30, dtype=torch.bool)
    torch.testing.assert_close(model(a, b, mask, None), model(a, b))


@pytest.mark.parametrize(
    "changes",
    [{}, {"decay": True, "heads": 2, "feed_forward": "swiglu"}, {"attention_norm": "sum"}, {"prenorm": False}],
)
@pytest.mark.parametrize("merged", [False, True])
def test_prefill_and_steps_equal_the_full_forward(changes, merged):
    model = make(replace(LM, **changes))
    tokens = torch.randint(20, (2, 64))  # past the kernel's 48 taps
    with torch.no_grad():
        whole = model(tokens)
        if merged:
            model.merge()
        for first in (1, 5, 47, 48, 63):
            logits, state = model.prefill(tokens[:, :first])
            pieces = [logits]
            for position in range(first, 64):
                logits, state = model.step(tokens[:, position], state)
                pieces.append(logits.unsqueeze(1))
            assert relative(torch.cat(pieces, 1), whole) < 1e-5


@given(cuts=st.sets(st.integers(1, 63), max_size=6))
def test_prefill_in_any_pieces(cuts):
    model = make(replace(LM, decay=True))
    tokens = torch.randint(20, (2, 64))
    state, pieces = None, []
    with torch.no_grad():
        for start, stop in itertools.pairwise([0, *sorted(cuts), 64]):
            logits, state = model.prefill(tokens[:, start:stop], state=state)
            pieces.append(logits)
        assert relative(torch.cat(pieces, 1), model(tokens)) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_prefill_of_a_padded_batch_continues_as_each_row_alone(side):
    model = make(replace(LM, decay=True, heads=2)).double()
    lengths = [20, 1, 9]
    tokens, mask = torch.zeros(3, 20, dtype=torch.long), torch.zeros(3, 20, dtype=torch.bool)
    rows = [torch.randint(20, (n,)) for n in lengths]
    for row, content in enumerate(rows):
        place = slice(0, len(content)) if side == "right" else slice(20 - len(content), 20)
        tokens[row, place], mask[row, place] = content, True
    following = torch.randint(20, (3,))
    logits, state = model.prefill(tokens, mask)
    after, _ = model.step(following, state)
    for row, content in enumerate(rows):
        alone, alone_state = model.prefill(content.unsqueeze(0))
        assert relative(logits[row, mask[row]], alone[0]) < 1e-10
        assert relative(after[row], model.step(following[row : row + 1], alone_state)[0][0]) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_prefill_for_the_last_logits_alone(padded):
    model, tokens = make(LM), torch.randint(LM.vocab, (2, 40))
    mask = torch.arange(40) >= torch.tensor([[0], [13]]) if padded else None
    logits, state = model.prefill(tokens, mask)
    with Watch() as watch:
        last, same = model.prefill(tokens, mask, last=3)
    torch.testing.assert_close(last, logits[:, -3:], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(same.tensors(), state.tensors(), strict=True))
    assert (2, 3, LM.vocab) in watch.sizes
    assert (2, 40, LM.vocab) not in watch.sizes


def test_packed_documents_equal_each_alone():
    model = make(LM).double()
    tokens = torch.randint(20, (1, 40))
    logits = model(tokens, cu_seqlens=torch.tensor([0, 7, 40], dtype=torch.int32))
    for start, stop in ((0, 7), (7, 40)):
        assert relative(logits[:, start:stop], model(tokens[:, start:stop])) < 1e-10


def test_gradients_flow_through_a_carried_state():
    model = make(LM).double()
    tokens = torch.randint(20, (1, 30))
    model(tokens)[:, 20:].sum().backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    _, state = model.prefill(tokens[:, :20])
    model.prefill(tokens[:, 20:], state=state)[0].sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-8, atol=1e-10)


def test_state_is_explicit():
    model = make(LM)
    tokens = torch.randint(20, (3, 10))
    _, state = model.prefill(tokens)
    assert state.batch_size == 3
    per_layer = 8 * 16 + 3 * 16 + 10 * 16  # attention K x V, short W-1, long so far
    assert state.nbytes == 3 * 2 * per_layer * 4
    copy = state.clone()
    before = [t.clone() for t in copy.tensors()]
    logits, _ = model.step(tokens[:, 0], state)
    for tensor, old in zip(copy.tensors(), before, strict=True):
        assert torch.equal(tensor, old)
    order = torch.tensor([2, 0, 0])
    picked, _ = model.step(tokens[order, 0], state.select(order))
    torch.testing.assert_close(picked, logits[order])
    assert all(not t.requires_grad for t in state.detach().tensors())
    assert state.to("cpu").batch_size == 3


@pytest.mark.parametrize("config", [SMALL, LM, replace(SMALL, kind="two-tower"), replace(SMALL, branch_norm=True)])
@pytest.mark.parametrize("merged", [False, True])
def test_save_and_load(config, merged, tmp_path):
    model = make(config)
    if merged:
        model.merge()
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    again = load_model(path, model.config)
    assert again.config == model.config
    assert list(tmp_path.iterdir()) == [path]
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_the_same_weights_give_the_same_file(tmp_path):
    """The library writes several entries of a header in an order drawn anew for each file."""
    path, model = tmp_path / "model.safetensors", make(SMALL)
    files = set()
    for _ in range(12):
        save_model(model, path)
        files.add(path.read_bytes())
    assert len(files) == 1


def test_matrices_on_disk_in_half_precision_are_the_weights_rounded(tmp_path):
    model = make(SMALL)
    save_model(model, tmp_path / "whole.safetensors")
    save_model(model, tmp_path / "half.safetensors", matrices=torch.float16)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.7 * sizes[1]
    loaded = load_model(tmp_path / "half.safetensors", SMALL).state_dict()
    for name, value in model.state_dict().items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value.half().float() if value.ndim > 1 else value), name


def test_load_refuses_what_it_cannot_trust(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="does not exist"):
        load_model(path)
    save_model(make(SMALL), path)
    with pytest.raises(ValueError, match=r"model\.heads was 1, now 2"):
        load_model(path, replace(SMALL, heads=2))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        load_model(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no model settings"):
        load_model(path)
    monkeypatch.setattr("chela.models.files.safe_open", Mock(side_effect=FileNotFoundError))  # as where rights lack
    with pytest.raises(ValueError, match="may not be read"):
        load_model(path)


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: make(SMALL)(torch.tensor([[1, 20]])), "token id 20 is outside .* 0..19"),
        (lambda: make(SMALL)(torch.tensor([[-1, 2]])), "token id -1"),
        (lambda: make(SMALL)(torch.zeros(1, 49, dtype=torch.long)), "49 steps is longer than model.kernel_length 48"),
        (lambda: make(SMALL)(torch.zeros(1, 4)), "tokens .* of type int64 or int32, got torch.float32"),
        (lambda: make(SMALL)(torch.zeros(1, 4, dtype=torch.uint8)), "of type int64 or int32, got torch.uint8"),
        (lambda: make(SMALL)([[1, 2]]), "reads a tensor, .* got list"),
        (lambda: make(replace(SMALL, inputs="real"))(torch.zeros(1, 4, dtype=torch.long)), "real values"),
        (lambda: CausalLM(SMALL), "causal"),
        (lambda: replace(LM, norm="batch"), "batch norm looks across"),
        (lambda: replace(LM, kind="lm"), "model.kind must be one of classifier, two-tower, causal-lm; got 'lm'"),  # pyrefly: ignore
        (lambda: replace(LM, layers="2"), "model.layers must be int, got '2'"),  # pyrefly: ignore
        (lambda: replace(LM, d_model=16.0), "model.d_model must be int, got 16.0"),  # pyrefly: ignore
    ],
)
def test_mistakes_are_named(call, part):
    with pytest.raises(ValueError, match=part):
        call()


def test_a_state_of_another_depth_is_refused():
    _, state = make(LM).prefill(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="the state has 2 layers, the model 3"):
        make(replace(LM, layers=3)).step(torch.zeros(1, dtype=torch.long), state)


def test_dropout_acts_only_in_training():
    model = build(replace(SMALL, dropout=0.5))
    tokens = torch.randint(20, (2, 30))
    assert not torch.equal(model.train()(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))


@pytest.mark.parametrize("inputs", ["tokens", "real"])
def test_dropped_steps_are_zero_and_the_others_untouched(inputs):
    embedding = Embedding(ModelConfig(inputs=inputs, vocab=16, d_model=8, token_dropout=0.25))
    x = torch.randint(16, (40, 50)) if inputs == "tokens" else torch.randn(40, 50, 1)
    whole = embedding.eval()(x)
    thinned = embedding.train()(x)
    dropped = (thinned == 0).all(2)
    assert torch.equal(thinned, whole.masked_fill(dropped[..., None], 0.0))
    assert abs(float(dropped.float().mean()) - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5
    assert not torch.equal(thinned, embedding(x)), "each step draws anew"
    thinned.sum().backward()
    kept = x[~dropped]
    if inputs == "tokens":
        got, expected = embedding.tokens.weight.grad, torch.bincount(kept, minlength=16)[:, None].expand(16, 8)
    else:
        got, expected = embedding.values.weight.grad, kept.sum(0)[None].expand(8, 1)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-4)
