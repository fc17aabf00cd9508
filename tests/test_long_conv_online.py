"""Online convolution: every output equals the full convolution's, whatever the cut into blocks and epochs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chela.ops import long_conv, long_conv_online_state, long_conv_step
from chela.ops.long_conv import reference
from chela.ops.long_conv.online import advance, emit, epoch_length, join
from chela.ops.random_inputs import draw, long_conv_inputs
from chela.ops.testing import assert_within_budget, relative_error

DOUBLE = torch.float64


def steps(x, kernel, state, impl: Any = "reference"):
    """Outputs [B, N, D] of tokens x [B, N, D]."""
    outs = []
    for token in x.unbind(1):
        out, after = long_conv_step(token, kernel, state=state, impl=impl)
        assert after is state
        outs.append(out)
    return torch.stack(outs, 1)


def by_definition(x, kernel):
    return reference.direct(x, kernel[:, : x.shape[1]], kernel[:, :0], x.shape[1])


# inputs before, taps: none to many epochs of 16; kernels of one tap, within a block, an epoch, the context, beyond it
@pytest.mark.parametrize(("block", "epoch"), [(1, 1), (1, 16), (4, 16), (8, 8), (16, 64)])
@pytest.mark.parametrize("lags", [1, 2, 7, 33, 100, 1000])
@pytest.mark.parametrize("carried", [0, 1, 15, 16, 49, 200])
def test_every_output_equals_the_full_convolution(carried, lags, block, epoch):
    x, kernel = draw(2, carried + 70, 3, seed=0, dtype=DOUBLE), draw(3, lags, seed=1, dtype=DOUBLE)
    _, before = long_conv(x[:, :carried], kernel, return_state=True)
    assert before is not None
    state = long_conv_online_state(before, kernel, block=block, epoch=epoch)
    out = steps(x[:, carried:], kernel, state)
    torch.testing.assert_close(out, by_definition(x, kernel)[:, carried:], rtol=0, atol=1e-11)


@given(
    carried=st.integers(0, 300), lags=st.integers(1, 400), tokens=st.integers(1, 80), clock=st.integers(0, 31),
    sizes=st.sampled_from([(1, 32), (2, 64), (8, 32), (32, 32)]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(carried, lags, tokens, clock, sizes, seed):
    x, kernel = draw(1, carried + tokens, 2, seed=seed, dtype=DOUBLE), draw(2, lags, seed=seed + 1, dtype=DOUBLE)
    state = long_conv_online_state(x[:, :carried], kernel, clock=clock, block=sizes[0], epoch=sizes[1])
    out = steps(x[:, carried:], kernel, state)
    torch.testing.assert_close(out, by_definition(x, kernel)[:, carried:], rtol=0, atol=1e-11)


@pytest.mark.parametrize("lags", [1500, 40_000])
def test_the_sizes_it_takes_itself(lags):
    x, kernel = draw(1, 5000, 2, seed=0, dtype=DOUBLE), draw(2, lags, seed=1, dtype=DOUBLE)
    state = long_conv_online_state(x[:, :2600], kernel)
    assert (state.block, state.epoch) == (64, epoch_length(lags))
    out = steps(x[:, 2600:], kernel, state)
    expected, _ = long_conv(x, kernel, impl="reference")
    assert relative_error(out, expected[:, 2600:]) < 1e-13


def test_epochs_are_a_32nd_of_a_long_kernel():
    assert [epoch_length(n) for n in (1, 2, 65, 1000, 1024, 30_000, 40_000, 2**20, 1_000_000)] == [
        1, 2, 128, 1024, 1024, 1024, 2048, 2**15, 2**15,
    ]  # fmt: skip


def test_rows_at_different_positions_equal_each_row_alone():
    x, kernel = draw(3, 90, 4, seed=0, dtype=DOUBLE), draw(4, 50, seed=1, dtype=DOUBLE)
    lengths = (40, 1, 23)
    before = torch.zeros(3, 40, 4, dtype=DOUBLE)
    for row, length in enumerate(lengths):
        before[row, 40 - length :] = x[row, 40 - length : 40]
    out = steps(x[:, 40:], kernel, long_conv_online_state(before, kernel, block=4, epoch=16))
    for row, length in enumerate(lengths):
        alone = by_definition(x[row : row + 1, 40 - length :], kernel)[:, length:]
        torch.testing.assert_close(out[row : row + 1], alone, rtol=0, atol=1e-11)


@pytest.mark.parametrize("taken", [5, 16, 31, 64, 77])
def test_a_row_joins_a_batch_that_is_under_way(taken):
    """A new prompt, shorter or longer than what the batch has read, takes the batch's clock."""
    sizes: dict[str, Any] = {"block": 4, "epoch": 32}
    x, kernel = draw(2, 200, 3, seed=0, dtype=DOUBLE), draw(3, 60, seed=1, dtype=DOUBLE)
    state = long_conv_online_state(x[:, :20], kernel, **sizes)
    steps(x[:, 20 : 20 + taken], kernel, state)
    for length in (0, 3, 50):
        new = draw(1, length + 70, 3, seed=2, dtype=DOUBLE)
        joined = join(
            [state.map(torch.clone), long_conv_online_state(new[:, :length], kernel, clock=state.clock, **sizes)]
        )
        following = torch.cat([x[:, 20 + taken :][:, :70], new[:, length:]])
        out = steps(following, kernel, joined)
        torch.testing.assert_close(out[:2], by_definition(x, kernel)[:, 20 + taken :][:, :70], rtol=0, atol=1e-11)
        torch.testing.assert_close(out[2:], by_definition(new, kernel)[:, length:], rtol=0, atol=1e-11)


def test_states_of_different_clocks_do_not_join():
    kernel = draw(3, 60, seed=1)
    states = [long_conv_online_state(draw(1, 9, 3, seed=0), kernel, clock=c, block=4, epoch=32) for c in (0, 1)]
    with pytest.raises(ValueError, match="states of one batch share clock"):
        join(states)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_within_the_budget(dtype, impl):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if impl == "triton":
        pytest.importorskip("triton")
        if device == "cpu" and dtype == torch.bfloat16:
            pytest.skip("Triton's interpreter cuts bfloat16 off instead of rounding")
    inputs = long_conv_inputs(2, 360, 40, 300, dtype=dtype, device=device)
    x, kernel = inputs["x"], inputs["kernel"]
    state = long_conv_online_state(x[:, :280], kernel, block=16, epoch=64)
    out = steps(x[:, 280:], kernel, state, impl)
    high = by_definition(x.double(), kernel.double())[:, 280:]
    low = by_definition(x, kernel.to(dtype))[:, 280:]
    assert_within_budget(out, low, high)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3, torch.float16: 3.5e-4}[dtype]
    assert relative_error(out, high) < rounding, "sums are float32: all the error is the output's rounding"


def test_triton_takes_float64_and_odd_sizes(nan_memory):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, kernel = (draw(3, 60, 33, seed=0, dtype=DOUBLE).to(device), draw(33, 5, seed=1, dtype=DOUBLE).to(device))
    state = long_conv_online_state(x[:, :9], kernel, block=8, epoch=16)
    out = steps(x[:, 9:], kernel, state, "triton")
    torch.testing.assert_close(out, by_definition(x, kernel)[:, 9:], rtol=0, atol=1e-11)
    none = long_conv_online_state(x[:0], kernel)
    assert long_conv_step(x[:0, 0], kernel, state=none, impl="triton")[0].shape == (0, 33)


def test_an_output_never_depends_on_other_rows_or_on_what_comes_later():
    x, kernel = draw(2, 80, 3, seed=0), draw(3, 60, seed=1)
    other = x.clone()
    other[1] = 1e30
    other[0, 50:] *= 1e20
    outs = [steps(y[:, 10:], kernel, long_conv_online_state(y[:, :10], kernel, block=4, epoch=16)) for y in (x, other)]
    assert torch.equal(outs[0][0, :40], outs[1][0, :40]), "bit-equal: a step cannot see what has not been given to it"


def test_states_are_tensors_to_copy_select_and_go_back_from():
    x, kernel = draw(3, 120, 4, seed=0), draw(4, 50, seed=1)
    sizes: dict[str, Any] = {"block": 4, "epoch": 16}
    state = long_conv_online_state(x[:, :30], kernel, **sizes)
    steps(x[:, 30:61], kernel, state)
    kept, order = state.map(torch.clone), torch.tensor([2, 0, 0])
    picked = state.map(lambda tensor: tensor.index_select(0, order))
    assert [t.shape[0] for t in state.tensors()] == [3] * 4
    plain = state.last_inputs()
    assert torch.equal(plain, x[:, 61 - 49 : 61])
    out = steps(x[:, 61:], kernel, state)
    assert torch.equal(steps(x[:, 61:], kernel, kept), out), "a copy is not moved by the original"
    assert torch.equal(steps(x[order, 61:], kernel, picked), out[order])
    again = long_conv_online_state(plain, kernel, **sizes)
    for other in (steps(x[:, 61:], kernel, again), long_conv(x[:, 61:], kernel, state=plain)[0]):
        torch.testing.assert_close(other, out, rtol=1e-5, atol=1e-5, msg="the last inputs are all of the state")


def test_a_state_is_what_it_is_made_from_untouched():
    x, kernel = draw(2, 100, 3, seed=0), draw(3, 40, seed=1)
    before, taps = x.clone(), kernel.clone()
    steps(x[:, 30:], kernel, long_conv_online_state(x[:, :30], kernel, block=4, epoch=16))
    assert torch.equal(x, before)
    assert torch.equal(kernel, taps)


class Work(TorchDispatchMode):
    """Calls of torch and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = [], 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
        out = func(*args, **kwargs or {})
        if not func.is_view:
            self.calls.append(func.name())
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor))
        return out


def test_the_cost_of_a_token_hardly_grows_with_the_context():
    """Bytes moved a token by an epoch of tokens and its beginning: 64 times the context, less than 3 times as many."""

    def online(context):
        tokens = epoch_length(context) - 1  # one more begins the next epoch
        kernel, before, x = draw(1, context, seed=0), draw(1, context - 1, 1, seed=1), draw(1, tokens, 1, seed=2)
        with Work() as work:
            steps(x, kernel, long_conv_online_state(before, kernel))
        return work.bytes / tokens

    def plain(context):
        with Work() as work:
            long_conv_step(draw(1, 1, seed=2), draw(1, context, seed=0), state=draw(1, context - 1, 1, seed=1))
        return work.bytes

    near, far = online(2**12), online(2**18)
    assert far < 3 * near
    assert plain(2**18) > 60 * plain(2**12), "the plain step is what grows"
    assert far < plain(2**12) / 10


def test_between_the_ends_of_blocks_a_step_is_the_same_few_calls():
    state = long_conv_online_state(draw(2, 30, 3, seed=0), draw(3, 90, seed=1), block=8, epoch=32)
    seen = set()
    for t in range(8):
        with Work() as work:
            emit(draw(2, 3, seed=t), state, triton=False)
        state.clock += 1
        seen.add((*work.calls,))
    assert len(seen) == 1
    assert state.position.tolist() == [8, 8]


@pytest.mark.parametrize("triton", [True, False])
def test_a_held_step_reads_the_clock_on_the_device(triton):
    """What a CUDA graph holds must not depend on the clock of the host."""
    if triton:
        pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, kernel = draw(2, 40, 3, seed=0, device=device), draw(3, 30, seed=1, device=device)
    state = long_conv_online_state(x[:, :10], kernel, block=8, epoch=32)
    outs = []
    for token in x[:, 10:].unbind(1):
        outs.append(emit(token, replace(state, clock=-1, held=True), triton=triton))
        advance(state, kernel)
    torch.testing.assert_close(torch.stack(outs, 1), by_definition(x, kernel)[:, 10:], rtol=1e-5, atol=1e-5)


KERNEL, X = draw(3, 40, seed=0), draw(2, 20, 3, seed=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": KERNEL[0]}, r"kernel must be \[D, L\], L >= 1; got \[40\]"),
        ({"inputs": X[0]}, r"inputs must be \[B, S, D\] with D = 3; got \[20, 3\]"),
        ({"inputs": X[:, :, :2]}, r"inputs must be \[B, S, D\] with D = 3; got \[2, 20, 2\]"),
        ({"block": 3}, "block and epoch must be powers of two, block <= epoch; got 3 and 64"),
        ({"block": 16, "epoch": 8}, "block <= epoch; got 16 and 8"),
        ({"block": 0}, "got 0 and 64"),
        ({"clock": 64}, "clock must lie within an epoch, 0 to 63; got 64"),
    ],
)
def test_a_state_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        long_conv_online_state(**{"inputs": X, "kernel": KERNEL} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X}, r"x must be \[B, D\]; got \[2, 20, 3\]"),
        ({"x": X[:1, 0]}, r"x must be \[B, D\] of the online state = \[2, 3\]; got \[1, 3\]"),
        ({"x": X[:, 0].half()}, "the online state must have the dtype of x, torch.float16"),
        ({"kernel": KERNEL[:, :39]}, "the online state was made with a kernel of 40 taps; got 39"),
        ({"x": X[:, 0].clone().requires_grad_()}, "an online state carries no gradients: step under torch.no_grad"),
    ],
)
def test_a_step_refuses_what_does_not_fit(changes, message):
    state = long_conv_online_state(X, KERNEL)
    with pytest.raises(ValueError, match=message):
        long_conv_step(**{"x": X[:, 0], "kernel": KERNEL, "state": state} | changes)
    assert state.clock == 0


def test_a_state_is_shown_by_its_sizes():
    state = long_conv_online_state(torch.zeros(2, 5, 3), torch.ones(3, 40), clock=4, block=4, epoch=16)
    assert repr(state) == "OnlineState(b=2, d=3, lags=40, clock=4, block=4, epoch=16, float32 on cpu)"
