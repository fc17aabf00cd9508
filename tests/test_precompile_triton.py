"""What Triton compiles: the same for every length, and before the first step."""

import pytest

pytest.importorskip("triton")
pytest.importorskip("triton.knobs")

from triton_kit import census  # pyrefly: ignore

KERNELS = {
    "batch_norm": 4,  # moments of parts, merged; rows; sums of gradients
    "feed_forward": 5,  # weights folded, forward; gradients of rows and of weights, the latter summed
    "gated_output": 7,  # weight folded, values and gate both ways; the weight's gradient and its sum
    "linear_attention": 10,  # one split 3, several splits 7: few rows are cut in time from 64 tokens on
    "long_conv": 21,  # Toeplitz tiles 7; rows on the chip 4 for each of two short sizes and 6 for one long
    "short_conv": 3,
}


@pytest.mark.parametrize("op", KERNELS)
def test_fifty_lengths_need_so_many_kernels(op):
    counts = census(op)
    assert len(counts) == 50
    assert counts[-1] == KERNELS[op], counts


def test_a_step_for_show_meets_what_steps_and_evaluations_launch():
    found = census("rehearsal")
    assert found["prepared"] >= found["later"] > 10
    assert found["missed"] == 0
    assert found["nothing was compiled"]
    assert found["found by its key"]
