"""The masks of dropout in Triton: in its interpreter without a GPU, on it with one."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from chela.ops import dropout, dropout_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def write(out_ptr, seed_ptr, rows, threshold, STREAM: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * 16 + tl.arange(0, 16)
    first = tl.program_id(1) * WIDTH
    kept = dropout_kernels.keep(tl.load(seed_ptr), row, first, threshold, STREAM, WIDTH)
    at = row[:, None] * (2 * WIDTH) + (first + tl.arange(0, WIDTH))[None, :]
    tl.store(out_ptr + at, kept.to(tl.int8), mask=(row < rows)[:, None])


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("stream", [0, 1])
def test_masks_are_those_of_the_reference_bit_for_bit(width, stream):
    for number, rate in ((0, 0.1), (-1, 0.5), (0x123456789ABCDEF, 0.9)):
        seed = torch.tensor(number, device=DEVICE)
        out = torch.full((37, 2 * width), 2, dtype=torch.int8, device=DEVICE)
        write[(3, 2)](out, seed, 37, dropout.threshold(rate), STREAM=stream, WIDTH=width)
        assert out.max() == 1
        assert torch.equal(out.bool(), dropout.keep(seed, 37, 2 * width, rate, stream=stream))
