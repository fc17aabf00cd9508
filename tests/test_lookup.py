"""Vectors of symbols, and their gradient in one order of summation."""

import pytest
import torch
from torch.nn import functional as F

from chela.models.lookup import FEW, Lookup, Symbols


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("count", [7, FEW + 1])
def test_values_and_gradients_are_torch_s(count, dtype):
    torch.manual_seed(0)
    table = torch.randn(count, 5, dtype=torch.float64, requires_grad=True)
    symbols = torch.randint(count - 1, (3, 40)).to(dtype)  # the last symbol has no place
    out, expected = Lookup.apply(symbols, table), F.embedding(symbols, table)
    assert torch.equal(out, expected)
    slope = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, table, slope)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, table, slope)[0], rtol=0, atol=1e-13)
    assert not gradient[-1].any()


def test_what_was_asked_of_torch_before_holds_again():
    table, symbols = torch.randn(FEW + 1, 5, requires_grad=True), torch.arange(40)
    for mode in ("default", "warn", "error"):
        torch.set_deterministic_debug_mode(mode)
        try:
            Lookup.apply(symbols, table).sum().backward()
            assert torch.get_deterministic_debug_mode() == ["default", "warn", "error"].index(mode)
        finally:
            torch.set_deterministic_debug_mode("default")


def test_autocast_does_not_narrow_the_gradient():
    table, symbols = torch.randn(7, 5, requires_grad=True), torch.randint(7, (3, 40))
    slope = torch.randn(3, 40, 5)
    (expected,) = torch.autograd.grad(F.embedding(symbols, table), table, slope)
    with torch.autocast("cpu", torch.bfloat16):
        (gradient,) = torch.autograd.grad(Lookup.apply(symbols, table), table, slope)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


def test_it_compiles_without_graph_breaks():
    table, symbols = torch.randn(7, 5, requires_grad=True), torch.randint(7, (3, 40))

    def loss(table):
        return Lookup.apply(symbols, table).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual, expected = (torch.autograd.grad(f(table), table)[0] for f in (compiled, loss))
    torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [20, FEW, FEW + 1, 5000])
def test_two_runs_on_a_gpu_give_the_same_bits(count):
    torch.manual_seed(0)
    table, symbols = Symbols(count, 128, device="cuda"), torch.randint(count, (64, 2048), device="cuda")
    slope = torch.randn(64, 2048, 128, device="cuda")
    first, *others = (torch.autograd.grad(table(symbols), table.weight, slope)[0] for _ in range(5))
    assert all(torch.equal(other, first) for other in others)
