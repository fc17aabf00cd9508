"""The loss of a language model without its logits in memory."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from chela.models.chunked_loss import chunked_cross_entropy

N, D, V = 103, 16, 37


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(N, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    labels = torch.randint(V, (N,))
    labels[torch.rand(N) < 0.3] = -100
    return x, weight, bias, labels


def plain(x, weight, bias, labels):
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum()


class Watch(TorchDispatchMode):
    """Names of all operations, the elements of the tensors they make, and the most of any."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.sizes, self.elements = set(), set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
                self.sizes.add(tuple(tensor.shape))
        return out


@pytest.mark.parametrize("rows", [1, 7, N - 1, N, 1000])
def test_loss_hits_and_gradients_are_those_of_the_plain_loss(rows):
    tensors = inputs()
    upstream = 0.37  # the gradient is scaled when it is asked for
    loss, hits = chunked_cross_entropy(*tensors, logits_at_once=rows * V)
    expected, expected_hits = plain(*tensors)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    assert hits == expected_hits > 0
    actual = torch.autograd.grad(loss * upstream, tensors[:3])
    for gradient, wanted in zip(actual, torch.autograd.grad(expected * upstream, tensors[:3]), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-13 * float(wanted.abs().max()))


def test_a_slice_has_one_position_at_least_and_shapes_are_free():
    x, weight, bias, labels = inputs()
    flat = chunked_cross_entropy(x, weight, bias, labels)[0]
    folded = chunked_cross_entropy(x.view(1, N, D), weight, bias, labels.view(1, N), logits_at_once=1)[0]
    torch.testing.assert_close(folded, flat, rtol=1e-13, atol=0)


def test_without_bias_and_without_any_label():
    x, weight, _, labels = inputs()
    loss, _ = chunked_cross_entropy(x, weight, None, labels, logits_at_once=5 * V)
    torch.testing.assert_close(loss, plain(x, weight, None, labels)[0], rtol=1e-13, atol=0)
    loss, hits = chunked_cross_entropy(x, weight, None, torch.full_like(labels, -100))
    assert (float(loss.detach()), int(hits)) == (0, 0)
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, [x, weight]))


def test_only_what_needs_a_gradient_gets_one():
    x, weight, bias, labels = inputs()
    loss, _ = chunked_cross_entropy(x.detach(), weight, bias.detach(), labels)
    loss.backward()
    assert (x.grad, bias.grad) == (None, None)
    assert weight.grad is not None


@pytest.mark.parametrize("learning", [True, False])
def test_gradients_are_computed_where_they_are_wanted_alone(learning):
    with torch.set_grad_enabled(learning), Watch() as watch:
        loss, _ = chunked_cross_entropy(*inputs())
    assert loss.requires_grad == learning
    assert ("aten.mm.out" in watch.names) == learning  # the product for the gradient of x


def test_under_autocast_the_error_is_that_of_bfloat16_and_gradients_keep_the_parameters_dtype():
    exact = inputs(torch.float64)
    single = [t.detach().float().requires_grad_() for t in exact[:3]]
    expected, _ = plain(*exact)
    wanted = torch.autograd.grad(expected, exact[:3])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = chunked_cross_entropy(single[0], single[1], single[2], exact[3], logits_at_once=7 * V)
        rough, _ = plain(single[0], single[1], single[2], exact[3])
    assert loss.dtype == torch.float32
    gradients = torch.autograd.grad(loss, single)
    rough_gradients = torch.autograd.grad(rough, single)
    for gradient, reference, want in zip(gradients, rough_gradients, wanted, strict=True):
        assert gradient.dtype == torch.float32
        budget = 2 * float((reference.double() - want).norm()) + 2**-9 * float(want.norm())
        assert float((gradient.double() - want).norm()) <= budget


def saved_bytes(compute) -> int:
    """Bytes of all tensors kept for the backward pass."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = compute()
    assert kept is not None
    return sum(sizes.values())


def test_neither_the_work_nor_what_is_kept_holds_all_logits():
    torch.manual_seed(0)
    n, d, vocab = 512, 8, 1000
    x = torch.randn(n, d, requires_grad=True)
    weight, bias = torch.randn(vocab, d, requires_grad=True), torch.zeros(vocab, requires_grad=True)
    labels = torch.randint(vocab, (n,))
    with Watch() as watch:
        loss, _ = chunked_cross_entropy(x, weight, bias, labels, logits_at_once=16 * vocab)
        loss.backward()
    assert watch.elements <= 16 * vocab  # of 512 * vocab
    kept = saved_bytes(lambda: chunked_cross_entropy(x, weight, bias, labels, logits_at_once=16 * vocab)[0])
    assert kept <= 4 * (n * d + vocab * d + vocab) + 4 * n * d
    assert saved_bytes(lambda: plain(x, weight, bias, labels)[0]) >= 4 * n * vocab


def test_it_compiles_without_a_break():
    tensors = inputs()
    compiled = torch.compile(
        lambda *t: chunked_cross_entropy(*t, logits_at_once=50 * V), fullgraph=True, backend="aot_eager"
    )
    loss, hits = compiled(*tensors)
    expected, expected_hits = plain(*tensors)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    assert hits == expected_hits
    torch.testing.assert_close(
        torch.autograd.grad(loss, tensors[:3]), torch.autograd.grad(expected, tensors[:3]), rtol=1e-11, atol=1e-12
    )
