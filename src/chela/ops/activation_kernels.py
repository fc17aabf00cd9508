"""Activations in Triton, float32 unless said."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """A square of an inverse root instead of a quotient: twelve instructions become five, and nothing overflows."""
    root = tl.rsqrt(1 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def silu(x):
    """In float32, rounded to the dtype of x, as torch does it."""
    wide = x.to(tl.float32)
    return (wide * sigmoid(wide)).to(x.dtype)


@triton.jit
def tanh(x):
    """Exact to 2e-7 also near 0, where 2 sigmoid(2 x) - 1 is not: there float32 gradients missed their budget."""
    shrunk = tl.exp2(tl.abs(x) * -2.8853900817779268)
    grown = (1 - shrunk) / (1 + shrunk)
    return tl.where(x < 0, -grown, grown)
