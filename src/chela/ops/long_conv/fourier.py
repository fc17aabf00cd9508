"""The long convolution by the convolution theorem, O((T + L) log(T + L)), forward and backward.

    Y = H K,    dH = G conj(K),    dK = sum over the batch of G conj(H)        (spectra of n points)

A circular convolution of n points equals the linear one on the T wanted positions when n >= T + L - 1 (what wraps
from the end lands on the state's positions) and n >= T + L2 (what wraps from the front lands behind the end). Both
directions are one kernel on the circle, lag -l being lag n - l, so they cost no more than one.

It is a registered op: complex numbers stay inside, where a compiler does not meet them, and its backward pass takes
real transforms where autograd through `torch.fft.rfft` takes complex ones of twice the work. Spectra are not kept for
the backward pass but taken anew: two more transforms, a third of the memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from chela.ops.precision import wide_dtype


def good_size(n: int) -> int:
    """The smallest even length of at least n whose only prime factors are 2, 3 and 5, which transform fast."""
    n += n % 2
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 2


def points(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> int:
    """How many points a transform needs for a linear result; arguments as in `fft_conv`."""
    return good_size(max(history.shape[1], length + kernel.shape[1] - 1, length + reverse.shape[1]))


def spectrum(x: Tensor, front: int, n: int) -> Tensor:
    """[B, T, D] with `front` zeros before it -> [B, D, n/2+1]; along contiguous time, as FFT libraries prefer."""
    return torch.fft.rfft(F.pad(x.to(wide_dtype(x.dtype)).mT, (front, n - front - x.shape[1])))


def kernel_spectrum(kernel: Tensor, reverse: Tensor, n: int, wide: torch.dtype) -> Tensor:
    """Both kernels on one circle of n points: [D, L], [D, L2] -> [D, n/2+1]."""
    gap = n - kernel.shape[1] - reverse.shape[1]
    return torch.fft.rfft(torch.cat([F.pad(kernel.to(wide), (0, gap)), reverse.to(wide).flip(1)], dim=1))


def fft_conv(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> Tensor:
    """Convolve `history` [B, S+T, D] with `kernel` [D, L] and `reverse` [D, L2].

    Args:
        history: the state followed by the input, any floating dtype.
        kernel: taps over lags 0.. into the past, L at most S+T.
        reverse: taps over lags 1.. into the future, L2 at most T-1.
        length: T >= 1.

    Returns:
        The last T outputs [B, T, D], in the dtype of history.
    """
    return torch.ops.chela.fft_conv.default(history, kernel, reverse, length)


def plain_fft_conv(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> Tensor:
    """The same in torch's own ops alone, for an exported graph: of any length, and it runs where chela is not.

    There are points enough for kernels longer than their reach.
    """
    end, wide = history.shape[1], wide_dtype(history.dtype)
    n = end + kernel.shape[1] + reverse.shape[1]
    product = spectrum(history, 0, n) * kernel_spectrum(kernel, reverse, n, wide)
    return torch.fft.irfft(product, n)[..., end - length : end].mT.to(history.dtype)


# Registered by schema, not by torch.library.custom_op: that loads the compiler, 1.7 s, when the op is first called.
_TAG = torch.Tag.pt2_compliant_tag
_INPUTS = "Tensor history, Tensor kernel, Tensor reverse, SymInt length"
torch.library.define("chela::fft_conv", f"({_INPUTS}) -> Tensor", tags=_TAG)
torch.library.define("chela::fft_conv_backward", f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor)", tags=_TAG)


@torch.library.impl("chela::fft_conv", "default")
def _forward(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> Tensor:
    n, end = points(history, kernel, reverse, length), history.shape[1]
    product = spectrum(history, 0, n)
    product *= kernel_spectrum(kernel, reverse, n, wide_dtype(history.dtype))
    out = history.new_empty(history.shape[0], length, history.shape[2])
    return out.copy_(torch.fft.irfft(product, n)[..., end - length : end].mT)


@torch.library.impl("chela::fft_conv_backward", "default")
def _backward(
    grad: Tensor, history: Tensor, kernel: Tensor, reverse: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for history, kernel and reverse, given that of the output [B, T, D]."""
    n, end = points(history, kernel, reverse, length), history.shape[1]
    g = spectrum(grad, end - length, n)
    h = spectrum(history, 0, n).conj_physical_()
    on_circle = torch.fft.irfft(h.mul_(g).sum(0), n)  # [D, n]
    d_kernel = kernel.new_empty(kernel.shape).copy_(on_circle[:, : kernel.shape[1]])
    d_reverse = reverse.new_empty(reverse.shape).copy_(on_circle[:, n - reverse.shape[1] :].flip(1))
    g *= kernel_spectrum(kernel, reverse, n, wide_dtype(history.dtype)).conj()
    d_history = history.new_empty(history.shape).copy_(torch.fft.irfft(g, n)[..., :end].mT)
    return d_history, d_kernel, d_reverse


@torch.library.register_fake("chela::fft_conv")
def _forward_shape(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> Tensor:
    return history.new_empty(history.shape[0], length, history.shape[2])


@torch.library.register_fake("chela::fft_conv_backward")
def _backward_shapes(
    grad: Tensor, history: Tensor, kernel: Tensor, reverse: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    return history.new_empty(history.shape), kernel.new_empty(kernel.shape), reverse.new_empty(reverse.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    *tensors, ctx.length = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *torch.ops.chela.fft_conv_backward.default(grad, *ctx.saved_tensors, ctx.length), None


def _differentiate_twice(ctx: Any, u: Tensor, w: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    """The convolution is linear in the input and in the kernels, so its gradients are again made of itself."""
    grad, history, kernel, reverse = ctx.saved_tensors
    d_grad = fft_conv(u, kernel, reverse, ctx.length) + fft_conv(history, w, w2, ctx.length)
    return d_grad, *torch.ops.chela.fft_conv_backward.default(grad, u, w, w2, ctx.length), None


torch.library.register_autograd("chela::fft_conv", _differentiate, setup_context=_save)
torch.library.register_autograd("chela::fft_conv_backward", _differentiate_twice, setup_context=_save)
