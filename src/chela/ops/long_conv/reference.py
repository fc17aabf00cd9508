"""Long depthwise convolution in plain torch: the sum over lags that defines it, and the Fourier form that runs.

Shapes: B batch, T time, D channels, L lags into the past, L2 lags into the future, S inputs carried in. `history` is
the state followed by the input, [B, S+T, D]; the last T positions are wanted.
"""

import functools

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from chela.ops.checks import compute_dtype
from chela.ops.documents import each_document

FEW_LAGS = 32
"""Up to so many lags the sum over lags is cheaper than Fourier transforms."""


def long_conv(
    x: Tensor,
    kernel: Tensor,
    *,
    reverse_kernel: Tensor | None,
    state: Tensor | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Run the convolution; arguments as in `chela.ops.long_conv`, already checked."""
    kept = kernel.shape[1] - 1

    def run(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        history = x if state is None else torch.cat([state, x], dim=1)
        out = _convolve(history, kernel, reverse_kernel, x.shape[1])
        return out, history[:, max(0, history.shape[1] - kept) :].clone() if return_state else history[:, :0]

    def run_filled(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        out, after = run(x, state)
        return out, F.pad(after, (0, 0, kept - after.shape[1], 0))

    if cu_seqlens is not None:
        out, state = each_document(run_filled, (x,), cu_seqlens, state)
    else:
        out, state = run(x, state)
    return out, state if return_state else None


def long_conv_step(x: Tensor, kernel: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
    """Take one token; arguments as in `chela.ops.long_conv_step`, already checked."""
    wide = compute_dtype(x.dtype)
    history = torch.cat([state, x.unsqueeze(1)], dim=1)  # [B, S+1, D]
    lags = history.shape[1]
    out = torch.einsum("bsd,ds->bd", history.to(wide), kernel[:, :lags].flip(1).to(wide))
    return out.to(x.dtype), history[:, max(0, lags - (kernel.shape[1] - 1)) :].clone()


def direct(
    history: Float[Tensor, "b s_plus_t d"], kernel: Float[Tensor, "d l"], reverse: Float[Tensor, "d l2"], length: int
) -> Float[Tensor, "b t d"]:
    """The definition: a sum over lags, O(T (L + L2))."""
    ahead, behind = reverse.shape[1], kernel.shape[1] - 1
    start = history.shape[1] - length
    padded = F.pad(history, (0, 0, behind, ahead))
    taps = [*zip(range(behind + 1), kernel.unbind(1), strict=True)]
    taps += [*zip(range(-1, -ahead - 1, -1), reverse.unbind(1), strict=True)]
    first = behind + start
    return functools.reduce(torch.add, (tap * padded[:, first - lag : first - lag + length] for lag, tap in taps))


def conv1d(
    history: Float[Tensor, "b s_plus_t d"], kernel: Float[Tensor, "d l"], reverse: Float[Tensor, "d l2"], length: int
) -> Float[Tensor, "b t d"]:
    """The same sum through torch's grouped convolution, for few lags."""
    ahead, behind = reverse.shape[1], kernel.shape[1] - 1
    start = history.shape[1] - length
    padded = F.pad(history, (0, 0, behind - start, ahead))  # cuts inputs out of reach where start > behind
    weight = torch.cat([kernel.flip(1), reverse], dim=1)
    return F.conv1d(padded.mT, weight.unsqueeze(1), groups=weight.shape[0]).mT


def fft(
    history: Float[Tensor, "b s_plus_t d"], kernel: Float[Tensor, "d l"], reverse: Float[Tensor, "d l2"], length: int
) -> Float[Tensor, "b t d"]:
    """The same by the convolution theorem: O((T + L) log(T + L)).

    A circular convolution of n points equals the linear one at the T wanted positions when n >= T + L - 1 (what
    wraps around from the end falls on positions of the state) and n >= T + L2 (what wraps from the front falls
    behind the end). Both directions are one kernel on the circle: lag -l is lag n - l.
    """
    ahead, behind = reverse.shape[1], kernel.shape[1] - 1
    n = good_size(max(length + behind, length + ahead, history.shape[1]))
    circle = torch.cat([F.pad(kernel, (0, n - behind - 1 - ahead)), reverse.flip(1)], dim=1)  # [D, n]
    spectrum = torch.fft.rfft(history, n, dim=1) * torch.fft.rfft(circle, n, dim=1).T
    return torch.fft.irfft(spectrum, n, dim=1)[:, history.shape[1] - length : history.shape[1]]


def good_size(n: int) -> int:
    """The smallest length of at least n whose only prime factors are 2, 3 and 5: Fourier transforms like them."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


def _convolve(history: Tensor, kernel: Tensor, reverse: Tensor | None, length: int) -> Tensor:
    """Cut the kernels to the lags that reach an input, and take the cheaper form."""
    if length == 0:
        return history[:, :0]
    wide = compute_dtype(history.dtype)
    kernel = kernel[:, : history.shape[1]].to(wide)
    reverse = kernel[:, :0] if reverse is None else reverse[:, : length - 1].to(wide)
    form = conv1d if kernel.shape[1] + reverse.shape[1] <= FEW_LAGS else fft
    return form(history.to(wide), kernel, reverse, length).to(history.dtype)
