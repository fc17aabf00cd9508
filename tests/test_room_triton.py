"""GPUs differ in the shared memory of a program: every kernel must fit, and what has no room runs in another way."""

import functools

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.knobs")

from chela.layers import block
from chela.ops import feed_forward as face
from chela.ops import launch
from chela.ops.feed_forward import feed_forward, fused
from chela.ops.linear_attention import plan
from chela.ops.long_conv.method import choose
from chela.ops.random_inputs import feed_forward_inputs
from chela.ops.testing import check_op
from triton_kit import census  # pyrefly: ignore

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def tight(monkeypatch):
    for module in (face, fused, plan):
        monkeypatch.setattr(module, "roomy", lambda device: False)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "room"), [(80, launch.TIGHT), (90, launch.ROOMY)])
def test_every_kernel_fits_into_shared_memory(capability, room):
    found = census(f"room {capability}")
    assert len(found) >= 10
    for case, kernels in found.items():
        assert max(kernels.values()) <= room, (case, kernels)
    assert any(max(kernels.values()) > 0.9 * room for kernels in found.values())  # the room is used


@pytest.mark.parametrize("gated", [False, True])
def test_tight_tiles_give_the_same_numbers(gated, tight, nan_memory):
    inputs = feed_forward_inputs(133, d=128, f=256, gated=gated, dtype=torch.float16, device=DEVICE)
    op, seed = functools.partial(feed_forward, norm="layer", dropout=0.1), torch.tensor(5, device=DEVICE)
    check_op(
        functools.partial(op, seed=seed, impl="triton"), functools.partial(op, seed=seed, impl="reference"), inputs
    )


def test_what_has_no_room_is_refused_or_left_to_the_reference(tight):
    x = torch.empty(0, 128)
    assert not face.fits(x)
    assert face.fits(x[:, :64])
    assert face.fits(x.half(), gated=True)
    assert not face.fits(torch.empty(0, 129).half())
    assert not face.fits(x[:, :1], gated=True)
    inputs = feed_forward_inputs(3, d=8, f=12, gated=True, device=DEVICE)
    with pytest.raises(ValueError, match=r"at most D = 0 with products of torch\.float32 on this device, and x has 8"):
        feed_forward(**inputs, norm="layer", impl="triton")
    module = block.ChelaBlock(
        block.ChelaLayer(8, kernel_length=4, d_key=4, d_value=8), d_ff=12, feed_forward="swiglu"
    ).to(DEVICE)
    x = torch.randn(2, 5, 8, device=DEVICE)
    torch.testing.assert_close(module(x, impl="triton")[0], module(x, impl="reference")[0], rtol=1e-3, atol=1e-3)


def test_wide_keys_keep_fewer_tiles_on_their_way(tight):
    sizes = 64, 2048, 256, 256
    forward, backward = plan.plans(*sizes, torch.bfloat16, torch.device("cpu"))
    assert (forward.stages, backward.stages, backward.query_stages) == (1, 2, 2)
    assert plan.plans(64, 2048, 128, 256, torch.bfloat16, torch.device("cpu"))[0].stages > 1
    assert plan.sums_plan(256, 256, torch.bfloat16, torch.device("cpu")).stages == 2


def test_the_longest_rows_on_a_chip_are_halved():
    for length, roomy, tight in (
        (4096, "on_chip", "on_chip"),
        (8192, "on_chip", "panels"),
        (2**20, "panels", "panels"),
    ):
        sizes = torch.bfloat16, length, length, length, 0
        assert choose(*sizes) == roomy
        assert choose(*sizes, room=False) == tight
