"""The long convolution that keeps spectra for its backward pass, where gradients are wanted and rows go in panels.

Of the history's spectra and those of the kernels, which the forward pass makes in any case, the backward pass makes
all gradients from one transform of the output's. They are saved in place of the history, and take twice its bytes and,
of the kernels, those of one more row. `kept.py` does the like for shorter rows. There is no second derivative.
"""

from typing import Any

import torch
from torch import Tensor

from chela.ops.launch import no_second_derivative
from chela.ops.long_conv.history import lengthen, within_reach


def convolve(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> Tensor:
    """Convolve; arguments and result as `chela.ops.long_conv.fourier.fft_conv`, sizes such that it `keeps_spectra`."""
    return torch.ops.chela.long_conv_keeping_spectra.default(history, kernel, reverse, length)[0]


_TAG = torch.Tag.pt2_compliant_tag
_TAPS = "Tensor kernel, Tensor reverse"
_KEPT = "Tensor kept, Tensor units, Tensor spectra, Tensor powers"
torch.library.define(
    "chela::long_conv_keeping_spectra",
    f"(Tensor history, {_TAPS}, SymInt length) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAG,
)
torch.library.define(
    "chela::long_conv_spectra_backward",
    f"(Tensor grad, {_KEPT}, {_TAPS}, SymInt total) -> (Tensor, Tensor, Tensor)",
    tags=_TAG,
)


@torch.library.impl("chela::long_conv_keeping_spectra", "default")
def _forward(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> tuple[Tensor, ...]:
    from chela.ops.long_conv import panels

    if not history.numel():
        return _shapes(history, kernel, reverse, length)
    kernel, reverse = within_reach(history.shape[1], kernel, reverse, length)
    return panels.forward_keeping(history, kernel, reverse, length)


@torch.library.impl("chela::long_conv_spectra_backward", "default")
def _backward(
    grad: Tensor,
    kept: Tensor,
    units: Tensor,
    spectra: Tensor,
    powers: Tensor,
    kernel: Tensor,
    reverse: Tensor,
    total: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from chela.ops.long_conv import panels

    if not (kept.numel() and total):
        empty = grad.new_empty(grad.shape[0], total, grad.shape[2])
        return empty, torch.zeros_like(kernel), torch.zeros_like(reverse)
    taps, ahead = within_reach(total, kernel, reverse, grad.shape[1])
    d_history, d_taps, d_ahead = panels.backward_of_kept(grad, (kept, units), (spectra, powers), taps, ahead, total)
    return d_history, lengthen(d_taps, kernel), lengthen(d_ahead, reverse)


@torch.library.register_fake("chela::long_conv_keeping_spectra")
def _shapes(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> tuple[Tensor, ...]:
    from chela.ops.long_conv.panels import kept_shapes

    batch, total, channels = history.shape
    kept = []
    for rows in (batch, 1):
        numbers, powers = kept_shapes(rows, total, channels)
        kept += [history.new_empty(numbers, dtype=torch.float16), history.new_empty(powers, dtype=torch.float32)]
    return history.new_empty(batch, length, channels), *kept


@torch.library.register_fake("chela::long_conv_spectra_backward")
def _backward_shapes(grad: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    (batch, _, channels), (*_, kernel, reverse, total) = grad.shape, others
    return grad.new_empty(batch, total, channels), kernel.new_empty(kernel.shape), reverse.new_empty(reverse.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    history, kernel, reverse, _ = inputs
    ctx.total = history.shape[1]
    ctx.save_for_backward(*output[1:], kernel, reverse)
    ctx.set_materialize_grads(False)  # what is kept has none, and zeros would take long to write


def _differentiate(ctx: Any, grad: Tensor, *kept: None) -> tuple[Tensor, Tensor, Tensor, None]:
    return *torch.ops.chela.long_conv_spectra_backward.default(grad, *ctx.saved_tensors, ctx.total), None


torch.library.register_autograd("chela::long_conv_keeping_spectra", _differentiate, setup_context=_save)
torch.library.register_autograd(
    "chela::long_conv_spectra_backward", no_second_derivative("long_conv of more than 8,192 inputs")
)
