import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from chela.config import ModelConfig, OptimConfig
from chela.models import build
from chela.training.optim import make_optimizer, parameter_group, schedule, set_rate
from training_kit import make_run  # pyrefly: ignore

TINY = ModelConfig(vocab=8, layers=1, d_model=4, d_ff=4, d_key=2, d_value=4, kernel_length=8, branches=(3,))


def names(group: str, model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter_group(name, parameter) == group}


def test_groups_of_a_real_model_by_name():
    model = build(TINY)
    assert all("kernel." in name for name in names("kernel", model))
    assert {name.removeprefix("backbone.blocks.0.") for name in names("matrix", model)} == {
        "layer.attention.from_z.weight",
        "layer.attention.from_x.weight",
        "layer.attention.out.weight",
        "layer.gates.weight",
        "feed_forward.0.weight",
        "feed_forward.3.weight",
        "head.weight",
    }
    plain = names("plain", model)
    for ending in ("embedding.tokens.weight", "q_gain", "k_bias", "norm_gain", "short_weight", "layer_norm.weight"):
        assert any(name.endswith(ending) for name in plain), ending


def test_every_parameter_is_optimised_once():
    model = build(TINY)
    optimizer = make_optimizer(model, OptimConfig())
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_matrices_alone_decay():
    model = build(TINY)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, OptimConfig(lr=0.5, weight_decay=0.25))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        share = 1 - 0.5 * 0.25 if name in names("matrix", model) else 1.0
        assert torch.equal(p, before[name] * share), name


@pytest.mark.parametrize(("kernel_lr", "expected"), [(0.0, 1e-3), (1e-4, 1e-4)])
def test_kernels_have_their_own_rate(kernel_lr, expected):
    optimizer = make_optimizer(build(TINY), OptimConfig(lr=1e-3, kernel_lr=kernel_lr))
    set_rate(optimizer, 0.5)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"kernel": expected / 2, "plain": 5e-4, "matrix": 5e-4}


def test_schedule_values():
    config = OptimConfig(warmup=4, schedule="linear")
    assert [schedule(config, step, 8) for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]
    cosine = OptimConfig(warmup=0, schedule="cosine")
    assert [schedule(cosine, step, 4) for step in range(4)] == pytest.approx(
        [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]
    )
    constant = OptimConfig(warmup=2, schedule="constant")
    assert [schedule(constant, step, 4) for step in range(4)] == [0.5, 1, 1, 1]


@given(
    steps=st.integers(1, 200),
    warmup=st.integers(0, 300),
    kind=st.sampled_from(["linear", "cosine", "constant"]),
)
def test_schedule_rises_then_falls_and_never_reaches_zero(steps, warmup, kind):
    values = [schedule(OptimConfig(warmup=warmup, schedule=kind), step, steps) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)
    top = min(warmup, steps)
    assert values[:top] == sorted(values[:top])
    assert values[top:] == sorted(values[top:], reverse=True)


def test_a_skipped_update_leaves_everything_bit_equal(tmp_path):
    torch.manual_seed(0)
    model = build(TINY)
    optimizer = make_optimizer(model, make_run(tmp_path).optim)

    def update(gradient: float, skip: float) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        optimizer.found_inf = torch.tensor(skip)  # pyrefly: ignore
        optimizer.step()

    def everything() -> list[torch.Tensor]:
        averages = [value for p in model.parameters() for value in optimizer.state[p].values()]
        return [value.clone() for value in [*model.parameters(), *averages]]

    update(0.1, 0.0)
    before = everything()
    update(math.nan, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    update(0.1, 0.0)
    assert not torch.equal(before[0], next(model.parameters()))
