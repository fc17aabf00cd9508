import copy
import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chela.layers import ChelaBlock, ChelaLayer, GatedLinearAttention, ShortLongConv
from chela.layers.feed_forward import SwiGLU
from chela.layers.long_kernel import BranchedKernel, DenseKernel, FoldedKernel, MultiscaleKernel
from chela.layers.norms import make_norm
from chela.layers.padding import zero_padding
from chela.ops import long_conv
from chela.ops.random_inputs import draw
from chela.ops.testing import check_op

D = 12
VARIANTS = {
    "plain": {},
    "heads": {"heads": 2},
    "sum": {"attention_norm": "sum"},
    "no-norm": {"attention_norm": "none"},
    "multiscale": {"kernel": "multiscale", "taps_per_octave": 4},
    "squash": {"squash": 0.01},
    "no-attention": {"attention": False},
    "no-short": {"short_width": 0},
    "no-long": {"kernel_length": 0},
    "no-branches": {"branches": ()},
}


def relative(actual, expected):
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-30))


def layer(causal=True, **changes):
    arguments: dict[str, Any] = {"kernel_length": 40, "d_key": 6, "d_value": 16, "short_width": 3, "branches": (3, 7)}
    return ChelaLayer(D, causal=causal, **(arguments | changes)).double().eval()


def pad(x, lengths, side):
    t = max(lengths)
    padded, mask = torch.full((len(lengths), t, x.shape[-1]), 7.0).to(x), torch.zeros(len(lengths), t, dtype=torch.bool)
    for row, n in enumerate(lengths):
        place = slice(0, n) if side == "right" else slice(t - n, t)
        padded[row, place], mask[row, place] = x[row, :n], True
    return padded, mask


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_shapes_and_gradients_reach_every_parameter(name, causal):
    module = layer(causal, **VARIANTS[name])
    x = torch.randn(2, 40, D, dtype=torch.float64, requires_grad=True)
    y, state = module(x)
    assert y.shape == x.shape
    assert state is None
    (y * torch.randn_like(y)).sum().backward()
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all()
        if "bias" not in parameter_name:
            assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", VARIANTS)
def test_pieces_with_carried_state_equal_the_whole(name):
    module = layer(True, **VARIANTS[name])
    x = torch.randn(2, 60, D, dtype=torch.float64)  # longer than the kernel: the window moves
    whole, end = module(x, return_state=True)
    for cuts in ([1, 2], [30], [59], list(range(1, 60))):
        state, pieces = None, []
        for start, stop in itertools.pairwise([0, *cuts, 60]):
            piece, state = module(x[:, start:stop], state=state, return_state=True)
            pieces.append(piece)
        assert relative(torch.cat(pieces, 1), whole) < 1e-10
        for got, want in zip(torch.utils._pytree.tree_leaves(state), torch.utils._pytree.tree_leaves(end), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@given(cuts=st.sets(st.integers(1, 49), max_size=5))
def test_decay_carries_over_any_split(cuts):
    torch.manual_seed(0)
    module = layer(True, decay=True, heads=2)
    x = torch.randn(1, 50, D, dtype=torch.float64)
    state, pieces = None, []
    for start, stop in itertools.pairwise([0, *sorted(cuts), 50]):
        piece, state = module(x[:, start:stop], state=state, return_state=True)
        pieces.append(piece)
    assert relative(torch.cat(pieces, 1), module(x)[0]) < 1e-10


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("norm", ["layer", "rms", "scale"])
def test_padded_rows_get_what_they_get_alone(name, causal, side, norm):
    block = ChelaBlock(layer(causal, **VARIANTS[name]), d_ff=16, norm=norm).double().eval()
    with torch.no_grad():
        block.layer.convolution.short_bias is not None and block.layer.convolution.short_bias.normal_()
    lengths = [40, 1, 23]
    x = torch.randn(3, 40, D, dtype=torch.float64)
    padded, mask = pad(x, lengths, side)
    y, _ = block(padded, mask=mask)
    for row, n in enumerate(lengths):
        alone, _ = block(x[row : row + 1, :n])
        assert relative(y[row, mask[row]], alone[0]) < 1e-10


def test_packed_documents_get_what_they_get_alone():
    module = layer(True, decay=True, heads=2)
    x = torch.randn(1, 50, D, dtype=torch.float64)
    bounds = [0, 13, 13, 14, 50]
    y, _ = module(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for start, stop in itertools.pairwise(bounds):
        if stop > start:
            assert relative(y[:, start:stop], module(x[:, start:stop])[0]) < 1e-10


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["dense", "multiscale"])
@pytest.mark.parametrize("branch_norm", [True, False])
def test_merge_folds_exactly(kind, causal, branch_norm):
    torch.manual_seed(3)
    conv = ShortLongConv(
        D, kernel_length=33, causal=causal, kernel=kind, taps_per_octave=4, branch_norm=branch_norm, squash=0.01,
        tap_dropout=0.3,
    )  # fmt: skip
    x = torch.randn(4, 33, D)
    conv.train()
    conv(x)  # gives the branch norms statistics
    conv.eval()
    before, _ = conv(x)
    separate = 0.0
    assert isinstance(conv.kernel, BranchedKernel)
    u, _ = ShortLongConv.forward(_without_kernel(conv), x)
    for index in range(3):
        taps = conv.kernel.branch(index)
        out, _ = long_conv(u, taps.forward, reverse_kernel=taps.reverse, causal=causal)
        separate = separate + (conv.kernel.norms[index](out) if conv.kernel.norms else out)
    conv.merge()
    assert isinstance(conv.kernel, FoldedKernel)
    after, _ = conv(x)
    assert relative(before, separate) < 1e-5
    assert relative(after, separate) < 1e-5


def _without_kernel(conv):
    bare = ShortLongConv(D, kernel_length=0, causal=conv.causal)
    bare.load_state_dict({name: value for name, value in conv.state_dict().items() if name.startswith("short")})
    return bare


def test_merge_leaves_the_mode_and_frees_the_branches():
    conv = ShortLongConv(D, kernel_length=33, tap_dropout=0.5).train().merge()
    assert conv.training
    assert [name for name, _ in conv.named_parameters()] == ["short_weight", "short_bias", "kernel.past"]
    assert conv.merge() is conv


def test_kernels_start_with_unit_energy():
    torch.manual_seed(0)
    for kernel in (DenseKernel(256, 512), MultiscaleKernel(256, 512, 16)):
        energy = kernel().square().sum(1).mean()
        assert 0.9 < energy < 1.1


def test_multiscale_kernel_holds_each_parameter_over_its_octave():
    kernel = MultiscaleKernel(1, 32, 4)
    assert kernel.taps.shape == (1, 4, 4)
    taps = kernel()[0]
    assert taps.shape == (32,)
    for start, width in ((8, 2), (10, 2), (16, 4), (28, 4)):
        assert (taps[start : start + width] == taps[start]).all()
    assert taps[8] != taps[10]


@pytest.mark.parametrize("length", [1, 7, 64, 1000])
def test_multiscale_kernel_is_the_same_by_product_and_by_pieces(length):
    kernel = MultiscaleKernel(5, length, 4).double()
    cotangent, results = torch.randn(5, length, dtype=torch.float64), []
    for holds in (kernel.holds, None):
        kernel.holds = holds
        (gradient,) = torch.autograd.grad(kernel(), kernel.taps, cotangent)
        results.append((kernel().detach(), gradient))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    assert results[0][0].shape == (5, length)


def test_a_layer_too_wide_for_a_fused_op_takes_kernels_for_the_others():
    block = ChelaBlock(ChelaLayer(272, kernel_length=8, d_key=8, d_value=16, branches=()), d_ff=16)
    x = torch.randn(1, 8, 272)
    with torch.no_grad():
        torch.testing.assert_close(block(x, impl="triton")[0], block(x)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [100, 2**18])
@pytest.mark.parametrize("way", ["to_empty", "assign"])
def test_a_multiscale_kernel_made_without_memory_gets_its_tables_with_its_weights(length, way, nan_memory):
    kernel = MultiscaleKernel(3, length)
    with torch.device("meta"):
        bare = MultiscaleKernel(3, length)
    assert all(tensor.is_meta for tensor in (*bare.parameters(), *bare.buffers()))
    if way == "to_empty":
        bare.to_empty(device="cpu")
    bare.load_state_dict(kernel.state_dict(), assign=way == "assign")
    assert torch.equal(bare(), kernel())
    bare.double().load_state_dict(kernel.state_dict())
    assert bare().dtype == torch.float64
    torch.testing.assert_close(bare(), kernel().double(), rtol=1e-6, atol=1e-8)


def test_a_very_long_multiscale_kernel_makes_no_matrix():
    kernel = MultiscaleKernel(1, 2**20)
    assert kernel.holds is None
    assert kernel().shape == (1, 2**20)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 1000])
def test_kernels_of_any_length(length):
    for kind in ("dense", "multiscale"):
        for causal in (True, False):
            taps = BranchedKernel(3, length, causal=causal, kind=kind)()
            assert taps.forward.shape == (3, length)
            assert (taps.reverse is None) == (causal or length == 1)
            if taps.reverse is not None:
                assert taps.reverse.shape == (3, length - 1)


def test_squash_and_tap_dropout_act_on_the_long_branch_alone():
    kernel = BranchedKernel(4, 64, causal=True, branches=(), squash=0.05, tap_dropout=0.5)
    kernel.eval()
    raw = kernel.past[0].taps * kernel.scale[0].unsqueeze(1)  # pyrefly: ignore
    squashed = kernel().forward
    assert ((raw.abs() <= 0.05 * kernel.scale[0].unsqueeze(1)) == (squashed == 0)).all()
    kernel.train()
    assert (kernel().forward == 0).float().mean() > (squashed == 0).float().mean() + 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_norm_statistics_leave_padding_out(side):
    lengths, x = [9, 4, 1], torch.randn(3, 9, D)
    padded, mask = pad(x, lengths, side)
    masked, flat = make_norm("batch", D), make_norm("batch", D)
    y = masked(padded, mask)
    rows = torch.cat([x[row, :n] for row, n in enumerate(lengths)]).unsqueeze(0)
    torch.testing.assert_close(y[mask], flat(rows)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(masked.running_mean, flat.running_mean)
    torch.testing.assert_close(masked.running_var, flat.running_var)


def test_causal_layers_ignore_the_future():
    module = layer(True, decay=True)
    x = torch.randn(1, 40, D, dtype=torch.float64)
    changed = x.clone()
    changed[:, 25:] += 1
    y, z = module(x)[0], module(changed)[0]
    assert relative(z[:, :25], y[:, :25]) < 1e-12  # the FFT leaks at rounding
    assert relative(z[:, 25:], y[:, 25:]) > 1e-3


@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("feed_forward", ["mlp", "swiglu", "bounded-swiglu"])
@pytest.mark.parametrize("norm", ["layer", "rms", "scale", "batch"])
def test_a_block_gives_the_same_numbers_on_kernels(norm, feed_forward, prenorm):
    block = ChelaBlock(
        ChelaLayer(16, kernel_length=20, d_key=8, d_value=16, causal=False, branches=(3,)),
        d_ff=32,
        feed_forward=feed_forward,
        norm=norm,
        prenorm=prenorm,
    )
    x, lengths = torch.randn(2, 20, 16), torch.tensor([[20], [13]])
    mask = torch.arange(20) < lengths
    results = []
    for impl in ("reference", "triton"):
        block.zero_grad()
        y, _ = block(x, mask=mask, impl=impl)
        (y * mask.unsqueeze(-1)).square().sum().backward()
        results.append((y[mask], [p.grad for p in block.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["swiglu", "bounded-swiglu"])
def test_a_block_with_swiglu_adds_what_its_formula_says(kind):
    block = ChelaBlock(layer(), d_ff=10, feed_forward=kind).double().eval()
    plain = ChelaBlock(block.layer, d_ff=0).double().eval()
    plain.layer_norm.load_state_dict(block.layer_norm.state_dict())
    x = torch.randn(2, 9, D, dtype=torch.float64)
    half, part, norm = plain(x)[0], block.feed_forward, block.feed_forward_norm
    assert isinstance(part, SwiGLU)
    assert norm is not None
    a, b = part.gate_up.weight[:10], part.gate_up.weight[10:]
    wide = norm(half)
    factor = torch.tanh(wide @ b.T) if kind == "bounded-swiglu" else wide @ b.T
    added = (torch.nn.functional.silu(wide @ a.T) * factor) @ part.down.weight.T
    torch.testing.assert_close(block(x)[0], half + added)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_folded_into_kernels_is_the_plain_one(training, masked, attention):
    """Values, every gradient and the running statistics, against float64."""
    torch.manual_seed(0)
    mixer = ChelaLayer(16, kernel_length=20, d_key=8, d_value=16, causal=False, branches=(3,), attention=attention)
    fused = ChelaBlock(mixer, d_ff=32, norm="batch").train(training)
    blocks = {"fused": fused, "plain": copy.deepcopy(fused), "exact": copy.deepcopy(fused).double()}
    mask = torch.arange(20) < torch.tensor([[20], [13]]) if masked else None

    def run(name, impl, x, **parameters):
        block = blocks["exact" if x.dtype == torch.float64 else name]
        y, _ = torch.func.functional_call(block, parameters, (x,), {"mask": mask, "impl": impl})
        return zero_padding(y, mask)

    inputs = {"x": 3 + torch.randn(2, 20, 16), **dict(fused.named_parameters())}
    check_op(functools.partial(run, "fused", "triton"), functools.partial(run, "plain", "reference"), inputs, draws=6)


def test_a_batch_norm_folded_into_kernels_counts_its_running_statistics():
    blocks = [ChelaBlock(ChelaLayer(16, kernel_length=20, d_key=8, d_value=16, branches=()), d_ff=32, norm="batch")]
    blocks.append(copy.deepcopy(blocks[0]))
    mask = torch.arange(20) < torch.tensor([[20], [13]])
    for step in range(3):
        x = 3 + draw(2, 20, 16, seed=step)
        for block, impl in zip(blocks, ("triton", "reference"), strict=True):
            block(x, mask=mask if step else None, impl=impl)
    norms: list[Any] = [block.feed_forward_norm for block in blocks]
    folded, plain = norms
    assert folded.num_batches_tracked == plain.num_batches_tracked == 3
    torch.testing.assert_close(folded.running_mean, plain.running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(folded.running_var, plain.running_var, rtol=1e-5, atol=1e-5)


def test_a_block_with_batch_norm_compiles_whole():
    """As in training on kernels: the statistics cross from one op to the other inside of the graph."""
    block = ChelaBlock(ChelaLayer(16, kernel_length=20, d_key=8, d_value=16, branches=()), d_ff=32, norm="batch")
    other = copy.deepcopy(block)
    compiled: Any = torch.compile(other, fullgraph=True, backend="aot_eager")
    x, mask = draw(2, 20, 16, seed=0), torch.arange(20) < torch.tensor([[20], [13]])
    for impl in ("triton", "reference"):
        results = []
        for each in (block, compiled):
            each.zero_grad()
            y, _ = each(x, mask=mask, impl=impl)
            y.square().sum().backward()
            results.append((y, [p.grad for p in each.parameters()], [*each.buffers()]))
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: make_norm("group", D), "norm must be one of"),  # pyrefly: ignore
        (lambda: ChelaBlock(layer(), feed_forward="glu"), "feed_forward must be one of mlp, swiglu, bounded-"),  # pyrefly: ignore
        (lambda: GatedLinearAttention(D, d_value=10, heads=3), "not a multiple"),
        (lambda: GatedLinearAttention(D, norm="max"), "norm must be"),  # pyrefly: ignore
        (lambda: GatedLinearAttention(D, causal=False, decay=True), "decay needs causal"),
        (lambda: layer()(torch.zeros(1, 4, D).double(), mask=torch.ones(1, 4).bool(), state=_state()), "exclude"),
        (
            lambda: layer()(torch.zeros(1, 4, D).double(), mask=torch.ones(1, 4)),
            "mask must be bool .* got torch.float32",
        ),
        (
            lambda: layer()(torch.zeros(1, 4, D).double(), mask=torch.ones(1, 3).bool()),
            r"mask must be .*got .*\[1, 3\]",
        ),
        (lambda: GatedLinearAttention(D, d_key=0), "d_key must be at least 1"),
        (lambda: ShortLongConv(D, kernel_length=-1), "kernel_length must not be negative"),
        (lambda: ShortLongConv(D, kernel_length=8, short_width=-1), "short_width must not be negative"),
        (lambda: ShortLongConv(D, kernel_length=8, kernel="thick"), "kernel must be dense or"),  # pyrefly: ignore
        (lambda: ShortLongConv(D, kernel_length=8, kernel="multiscale", taps_per_octave=0), "taps_per_octave must be"),
        (lambda: ShortLongConv(D, kernel_length=8, branches=(3, 0)), "branches must be positive"),
        (lambda: ShortLongConv(D, kernel_length=8, tap_dropout=1.0), "tap_dropout lie in"),
        (lambda: ChelaLayer(D, kernel_length=0, short_width=0, attention=False), "nothing mixes the sequence"),
    ],
)
def test_mistakes_are_named(make, part):
    with pytest.raises(ValueError, match=part):
        make()


def _state():
    return layer()(torch.zeros(1, 4, D).double(), return_state=True)[1]


def test_branch_norm_cannot_carry_a_state_while_training():
    conv = ShortLongConv(D, kernel_length=8, branch_norm=True).train()
    with pytest.raises(ValueError, match=r"whole sequences.*eval\(\).*branch_norm=False"):
        conv(torch.randn(1, 8, D), return_state=True)
    conv.eval()(torch.randn(1, 8, D), return_state=True)
    conv.train().merge()(torch.randn(1, 8, D), return_state=True)
