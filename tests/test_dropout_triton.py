"""The masks of dropout in Triton: in its interpreter without a GPU, on it with one."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from chela.ops import dropout, dropout_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def write(out_ptr, bits_ptr, seed_ptr, rows, threshold, STREAM: tl.constexpr, WIDTH: tl.constexpr, WAY: tl.constexpr):
    row = tl.program_id(0) * 16 + tl.arange(0, 16)
    there = row < rows
    first = tl.program_id(1) * WIDTH
    seed = tl.load(seed_ptr)
    column = first + tl.arange(0, WIDTH)
    if WAY == "keep":
        kept = dropout_kernels.keep(seed, row, first, threshold, STREAM, WIDTH)
    else:
        dropout_kernels.draw(bits_ptr, seed, row, first, there, threshold, STREAM, WIDTH, 2 * WIDTH)
        if WAY == "whole rows":  # of which another program has the other half, and none waits for another
            dropout_kernels.draw(bits_ptr, seed, row, WIDTH - first, there, threshold, STREAM, WIDTH, 2 * WIDTH)
        tl.debug_barrier()
        if WAY == "whole rows":
            kept = dropout_kernels.drawn_loaded(bits_ptr, row, there, 2 * WIDTH)
            column = tl.arange(0, 2 * WIDTH)
        else:
            kept = dropout_kernels.drawn(bits_ptr, row, first, there, WIDTH, 2 * WIDTH)
    tl.store(out_ptr + row[:, None] * (2 * WIDTH) + column[None, :], kept.to(tl.int8), mask=there[:, None])


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize("way", ["keep", "stored", "whole rows"])
def test_masks_are_those_of_the_reference_bit_for_bit(way, width, stream):
    for number, rate in ((0, 0.1), (-1, 0.5), (0x123456789ABCDEF, 0.9)):
        seed = torch.tensor(number, device=DEVICE)
        out = torch.full((37, 2 * width), 2, dtype=torch.int8, device=DEVICE)
        bits = torch.full((37, width // 4), 85, dtype=torch.uint8, device=DEVICE)
        write[(3, 2)](out, bits, seed, 37, dropout.threshold(rate), STREAM=stream, WIDTH=width, WAY=way)
        assert out.max() == 1
        assert torch.equal(out.bool(), dropout.keep(seed, 37, 2 * width, rate, stream=stream))
