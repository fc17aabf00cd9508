"""The long convolution with a kernel that is constant over ever longer runs of lags, without a Fourier transform.

A kernel of J octaves of m taps holds tap i of octave j over h_j lags (`MultiscaleKernel`): h = 1, 1, 2, 4, 8 ... and
lags start at 0 in the first octave, at m h_j in the others. Held taps meet sums of h neighbouring inputs, which double
from octave to octave, so m (J - 1) + m multiplications an output serve m 2^(J-1) lags:

    S_1 = x,  S_2h[t] = S_h[t] + S_h[t - h]
    out_t = sum_i taps[0, i] x[t - i]  +  sum_{j >= 1} sum_i taps[j, i] S_{h_j}[t - h_j (m + i)]

Shapes: B batch, S inputs carried in, T time, D channels, L lags.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from chela.ops.precision import wide_dtype


def multiscale(
    history: Float[Tensor, "b s_plus_t d"], taps: Float[Tensor, "d j m"], lags: int, length: int
) -> Float[Tensor, "b t d"]:
    """Convolve causally with the first `lags` lags of a kernel given by its taps.

    Args:
        history: the state followed by the input.
        taps: m taps for each octave, the shortest lags first.
        lags: L, at most m 2^(J-1); the run of lags that L cuts through is cut.
        length: T, the outputs wanted, the last ones.

    Returns:
        The last T outputs, in the dtype of history.
    """
    wide = wide_dtype(history.dtype)
    sums = history.to(wide)
    seen, (_, octaves, m) = sums.shape[1], taps.shape
    out = sums.new_zeros(history.shape[0], length, history.shape[2])
    held, wanted = 1, seen - length
    for octave in range(octaves):
        if octave >= 2:
            sums = sums + _later(sums, held)  # S_2h
            held *= 2
        for tap in range(m):
            first = held * (tap + (m if octave else 0))  # lag
            if first >= min(lags, seen):
                break
            whole = first + held <= lags
            run = sums if whole else moving_sum(history.to(wide), lags - first)
            begin = max(first - wanted, 0)  # earlier outputs reach back before the history
            out[:, begin:] += taps[:, octave, tap].to(wide) * run[:, wanted + begin - first : seen - first]
    return out.to(history.dtype)


def moving_sum(x: Float[Tensor, "b t d"], width: int) -> Float[Tensor, "b t d"]:
    """Sums of the last `width` inputs, by doubling: as many additions as width has binary digits, twice at most."""
    total, offset, power = torch.zeros_like(x), 0, x
    for bit in range(width.bit_length()):
        if width >> bit & 1:
            total = total + _later(power, offset)
            offset += 1 << bit
        power = power + _later(power, 1 << bit)
    return total


def _later(x: Tensor, steps: int) -> Tensor:
    """x[t - steps], zero before the beginning."""
    return torch.nn.functional.pad(x, (0, 0, steps, 0))[:, : x.shape[1]]
