"""The steps of a row's transform in Triton, for `on_chip_kernels.py`: a row of N = N1 N2 times in one program.

With theta = exp(i pi / 2N), n = n1 N2 + n2 and k = k1 + N1 k2, the values of a row at the N roots of z^N = i are the
Fourier transform of theta^n x_n, in two steps with unitary factors:

    A[k1, n2] = sum_n1 F1[k1, n1] x[n1, n2],            F1 = exp(i pi n1 / 2 N1 - 2 pi i k1 n1 / N1) / sqrt(N1)
    C[k1, k2] = sum_n2 (A W)[k1, n2] F2[n2, k2],        W = exp(i pi n2 / 2 N - 2 pi i k1 n2 / N)

A product waits for the one before it, so of short rows one makes the real and the imaginary part SIDE by side; of long
ones both at once take more registers than a thread has.

Tables: f1 is F1's real part above its imaginary one [2 N1, N1] and, of its transpose, one beside the other [N1, 2 N1];
f2 [2, N2, 2 N2] is F2, symmetric, and i F2, parts side by side; twiddle [2, N1, N2] is W. Tiles are [N1, N2] unless
said otherwise.
"""

import triton.language as tl

from chela.ops.launch import jit


@jit()
def power_below(most):
    """The power of two that brings `most` to [1, 2); 2^-100 for zero."""
    return tl.exp2(tl.floor(tl.log2(tl.maximum(most, 1e-30))))


@jit()
def power_of(re, im):
    """The power of two that brings the largest entry of two tiles to [1, 2); 2^-100 for zeros."""
    return power_below(tl.max(tl.maximum(tl.abs(re), tl.abs(im))))


@jit()
def load_row(pointer, keep):
    """A row as float16 numbers below 2, zero where not kept, and the power of two they were divided by."""
    v = tl.load(pointer, mask=keep, other=0).to(tl.float32)
    scale = power_of(v, v)
    return (v * (1 / scale)).to(tl.float16), scale


@jit()
def _table(pointer, row: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Numbers [R, C] whose rows are `row` apart."""
    return tl.load(pointer + tl.arange(0, R)[:, None] * row + tl.arange(0, C)[None, :])


@jit()
def both(pointer, N1: tl.constexpr, N2: tl.constexpr):
    """Real and imaginary part of a tile [2, N1, N2]."""
    return _table(pointer, N2, N1, N2), _table(pointer + N1 * N2, N2, N1, N2)


@jit()
def matrices(f1, f2, SIDE: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """F1, its transpose and F2, which stay in shared memory: two parts each, apart or, in one of F1's, SIDE by side."""
    back = f1 + 2 * N1 * N1
    if SIDE:
        first, last = _table(f1, N1, 2 * N1, N1), _table(back, 2 * N1, N1, 2 * N1)
        second = _table(f2, 2 * N2, N2, 2 * N2), _table(f2 + 2 * N2 * N2, 2 * N2, N2, 2 * N2)
    else:
        first = _table(f1, N1, N1, N1), _table(f1 + N1 * N1, N1, N1, N1)
        last = _table(back, 2 * N1, N1, N1), _table(back + N1, 2 * N1, N1, N1)
        second = _table(f2, 2 * N2, N2, N2), _table(f2 + N2, 2 * N2, N2, N2)
    return first, last, second


@jit()
def _times_f2(br, bi, f2, SIDE: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """The product of a complex tile in float16 with F2, both parts in float32."""
    if SIDE:
        c = tl.reshape(tl.dot(bi, f2[1], tl.dot(br, f2[0])), (N1, 2, N2))
        cr, ci = tl.split(tl.permute(c, (0, 2, 1)))
    else:
        cr, ci = tl.dot(-bi, f2[1], tl.dot(br, f2[0])), tl.dot(bi, f2[0], tl.dot(br, f2[1]))
    return cr, ci


@jit()
def transform(v, factors, twiddle, SIDE: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """Real row in float16 -> spectrum, real and imaginary parts in float32."""
    f1, _, f2 = factors
    if SIDE:
        zr, zi = tl.split(tl.permute(tl.reshape(tl.dot(f1, v), (2, N1, N2)), (1, 2, 0)))
    else:
        zr, zi = tl.dot(f1[0], v), tl.dot(f1[1], v)
    wr, wi = twiddle
    return _times_f2((zr * wr - zi * wi).to(tl.float16), (zr * wi + zi * wr).to(tl.float16), f2, SIDE, N1, N2)


@jit()
def half_inverse(pr, minus_pi, factors, twiddle, SIDE: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """A spectrum's conjugate in float16 -> what F1 is still to be undone of, in float16.

    The conjugate's product with F2 is the conjugate of what undoes F2.
    """
    dr, minus_di = _times_f2(pr, minus_pi, factors[2], SIDE, N1, N2)
    wr, wi = twiddle
    return (dr * wr - minus_di * wi).to(tl.float16), (-minus_di * wr - dr * wi).to(tl.float16)


@jit()
def real_part(er, ei, factors, SIDE: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """The real part of what is left when F1 is undone, in float32."""
    back = factors[1]
    if SIDE:
        y = tl.dot(back, tl.reshape(tl.permute(tl.join(er, ei), (2, 0, 1)), (2 * N1, N2)))
    else:
        y = tl.dot(back[1], ei, tl.dot(back[0], er))
    return y
