"""The long convolution that keeps rows for its backward pass, where gradients are wanted and its method makes rows.

The history comes into rows [D, B, places] in any case, and both passes want it there. So they are what is saved for
the backward pass, in place of the history, of whose size they are but for a last block. How many places there are
follows from lengths alone, whatever the method, which the compiler does not know.

Gradients that reach the rows themselves come from second derivatives only: the rows are the history in another order,
and their gradient is put into the history's.
"""

from typing import Any

import torch
from torch import Tensor

from chela.ops.long_conv.history import lengthen, places, within_reach
from chela.ops.long_conv.method import method_of


def convolve(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> Tensor:
    """Convolve; arguments and result as `chela.ops.long_conv.fourier.fft_conv`, sizes such that the method `keeps`."""
    return torch.ops.chela.long_conv_keeping.default(history, kernel, reverse, length)[0]


_TAG = torch.Tag.pt2_compliant_tag
_TAPS = "Tensor kernel, Tensor reverse"
_KEPT = f"Tensor grad, Tensor rows, {_TAPS}, SymInt total, SymInt length"
torch.library.define(
    "chela::long_conv_keeping", f"(Tensor history, {_TAPS}, SymInt length) -> (Tensor, Tensor)", tags=_TAG
)
torch.library.define("chela::long_conv_kept_backward", f"({_KEPT}) -> (Tensor, Tensor, Tensor)", tags=_TAG)


@torch.library.impl("chela::long_conv_keeping", "default")
def _forward(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> tuple[Tensor, Tensor]:
    if not history.numel():
        return _shapes(history, kernel, reverse, length)
    total = history.shape[1]
    kernel, reverse = within_reach(total, kernel, reverse, length)
    return method_of(history, total, kernel, reverse, length).forward_keeping(history, kernel, reverse, length)


@torch.library.impl("chela::long_conv_kept_backward", "default")
def _backward(
    grad: Tensor, rows: Tensor, kernel: Tensor, reverse: Tensor, total: int, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    if not rows.numel():
        empty = grad.new_empty(grad.shape[0], total, grad.shape[2])
        return empty, torch.zeros_like(kernel), torch.zeros_like(reverse)
    taps, ahead = within_reach(total, kernel, reverse, length)
    method = method_of(rows, total, taps, ahead, length)
    d_history, d_taps, d_ahead = method.backward_of_kept(grad, rows.contiguous(), taps, ahead, total, length)
    return d_history, lengthen(d_taps, kernel), lengthen(d_ahead, reverse)


@torch.library.register_fake("chela::long_conv_keeping")
def _shapes(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> tuple[Tensor, Tensor]:
    batch, total, channels = history.shape
    return history.new_empty(batch, length, channels), history.new_empty(channels, batch, places(total, length))


@torch.library.register_fake("chela::long_conv_kept_backward")
def _backward_shapes(
    grad: Tensor, rows: Tensor, kernel: Tensor, reverse: Tensor, total: int, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, channels = grad.shape
    return grad.new_empty(batch, total, channels), kernel.new_empty(kernel.shape), reverse.new_empty(reverse.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    history, kernel, reverse, ctx.length = inputs
    ctx.total = history.shape[1]
    ctx.save_for_backward(output[1], kernel, reverse)
    ctx.set_materialize_grads(False)  # the rows have none, as a rule, and zeros would take as long to write


def _differentiate(
    ctx: Any, grad: Tensor | None, d_rows: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    rows, kernel, reverse = ctx.saved_tensors
    grads: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if grad is not None:
        grads = torch.ops.chela.long_conv_kept_backward.default(grad, rows, kernel, reverse, ctx.total, ctx.length)
    d_history, d_kernel, d_reverse = grads
    if d_rows is not None:
        more = _method(ctx, rows, kernel, reverse).recover(d_rows, ctx.total, ctx.length)
        d_history = more if d_history is None else d_history + more
    return d_history, d_kernel, d_reverse, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    *tensors, ctx.total, ctx.length = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_twice(
    ctx: Any, u: Tensor, w: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
    """As without rows (`fused.py`), once the history has been recovered from them."""
    grad, rows, kernel, reverse = ctx.saved_tensors
    convolve, length, method = torch.ops.chela.long_conv.default, ctx.length, _method(ctx, rows, kernel, reverse)
    d_grad = convolve(u, kernel, reverse, length) + convolve(method.recover(rows, ctx.total, length), w, w2, length)
    d_history, d_kernel, d_reverse = torch.ops.chela.long_conv_backward.default(grad, u, w, w2, length)
    return d_grad, method.as_kept(d_history, length), d_kernel, d_reverse, None, None


def _method(ctx: Any, rows: Tensor, kernel: Tensor, reverse: Tensor) -> Any:
    return method_of(rows, ctx.total, *within_reach(ctx.total, kernel, reverse, ctx.length), ctx.length)


torch.library.register_autograd("chela::long_conv_keeping", _differentiate, setup_context=_save)
torch.library.register_autograd("chela::long_conv_kept_backward", _differentiate_twice, setup_context=_save_backward)
