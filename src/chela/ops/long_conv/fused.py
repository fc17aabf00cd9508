"""The long convolution on a GPU: registered ops that choose their method by shape, and their gradients.

Two ops, for batches and for packed documents. `kept.py` and `kept_spectra.py` have others for most batches, where
gradients are wanted.
Triton is imported when one of them runs. Everything else about state and documents is done as in the reference.
"""

from typing import Any

import torch
from torch import Tensor

from chela.ops.launch import roomy
from chela.ops.long_conv import kept, kept_spectra, packed
from chela.ops.long_conv.history import lengthen, with_history, within_reach
from chela.ops.long_conv.method import keeps, keeps_spectra, method_of


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
    if cu_seqlens is not None and x.dtype in (torch.bfloat16, torch.float16):
        carried = x.new_empty(cu_seqlens.shape[0] - 1, 0, x.shape[2]) if state is None else state
        out = torch.ops.chela.packed_long_conv.default(x, carried, kernel, cu_seqlens)
        return out, packed.last_inputs(x, state, cu_seqlens, kernel.shape[1] - 1) if return_state else None
    return with_history(
        _convolve,
        x,
        kernel,
        reverse_kernel=reverse_kernel,
        state=state,
        return_state=return_state,
        cu_seqlens=cu_seqlens,
    )


def _convolve(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> Tensor:
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (history, kernel, reverse))
    sizes = history.dtype, history.shape[1]
    if wanted and keeps(*sizes, room=roomy(history.device)):
        return kept.convolve(history, kernel, reverse, length)
    if wanted and keeps_spectra(*sizes, kernel.shape[1] + reverse.shape[1]):
        return kept_spectra.convolve(history, kernel, reverse, length)
    return torch.ops.chela.long_conv.default(history, kernel, reverse, length)


# Registered by schema, not by torch.library.custom_op: that loads the compiler, 1.7 s, when the op is first called.
_TAG = torch.Tag.pt2_compliant_tag
_INPUTS = "Tensor history, Tensor kernel, Tensor reverse, SymInt length"
_PACKED = "Tensor x, Tensor state, Tensor kernel, Tensor cu_seqlens"
_GRADS = "(Tensor, Tensor, Tensor)"
torch.library.define("chela::long_conv", f"({_INPUTS}) -> Tensor", tags=_TAG)
torch.library.define("chela::long_conv_backward", f"(Tensor grad, {_INPUTS}) -> {_GRADS}", tags=_TAG)
torch.library.define("chela::packed_long_conv", f"({_PACKED}) -> Tensor", tags=_TAG)
torch.library.define("chela::packed_long_conv_backward", f"(Tensor grad, {_PACKED}) -> {_GRADS}", tags=_TAG)


@torch.library.impl("chela::long_conv", "default")
def _forward(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> Tensor:
    if not history.numel():
        return history.new_empty(history.shape[0], length, history.shape[2])
    total = history.shape[1]
    kernel, reverse = within_reach(total, kernel, reverse, length)  # here, where a compiler does not look at lengths
    return method_of(history, total, kernel, reverse, length).forward(history, kernel, reverse, length)


@torch.library.impl("chela::long_conv_backward", "default")
def _backward(
    grad: Tensor, history: Tensor, kernel: Tensor, reverse: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    if not history.numel():
        return tuple(torch.zeros_like(tensor) for tensor in (history, kernel, reverse))  # pyrefly: ignore
    total = history.shape[1]
    taps, ahead = within_reach(total, kernel, reverse, length)
    method = method_of(history, total, taps, ahead, length)
    d_history, d_taps, d_ahead = method.backward(grad, history, taps, ahead, length)
    return d_history, lengthen(d_taps, kernel), lengthen(d_ahead, reverse)


@torch.library.register_fake("chela::long_conv")
def _forward_shape(history: Tensor, kernel: Tensor, reverse: Tensor, length: int) -> Tensor:
    return history.new_empty(history.shape[0], length, history.shape[2])


@torch.library.register_fake("chela::long_conv_backward")
def _backward_shapes(
    grad: Tensor, history: Tensor, kernel: Tensor, reverse: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    return history.new_empty(history.shape), kernel.new_empty(kernel.shape), reverse.new_empty(reverse.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    *tensors, ctx.length = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *torch.ops.chela.long_conv_backward.default(grad, *ctx.saved_tensors, ctx.length), None


def _differentiate_twice(ctx: Any, u: Tensor, w: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    """The convolution is linear in the input and in the kernels, so its gradients are again made of itself."""
    grad, history, kernel, reverse = ctx.saved_tensors
    convolve, length = torch.ops.chela.long_conv.default, ctx.length
    d_grad = convolve(u, kernel, reverse, length) + convolve(history, w, w2, length)
    return d_grad, *torch.ops.chela.long_conv_backward.default(grad, u, w, w2, length), None


torch.library.register_autograd("chela::long_conv", _differentiate, setup_context=_save)
torch.library.register_autograd("chela::long_conv_backward", _differentiate_twice, setup_context=_save)


def _packing(x: Tensor, state: Tensor, kernel: Tensor, cu_seqlens: Tensor) -> tuple[packed.Layout, Tensor, Tensor, Any]:
    """The layout, the history in it [1, size, D], the kernel within reach, and what Toeplitz tiles need to know."""
    from chela.ops.long_conv import toeplitz

    layout = packed.lay_out(cu_seqlens, x.shape[1], state.shape[1], toeplitz.TILES.block)
    taps = kernel[:, : x.shape[1] + state.shape[1]]
    return layout, packed.fill(layout, x, state), taps, toeplitz.Packing(layout.before, layout.after)


@torch.library.impl("chela::packed_long_conv", "default")
def _forward_packed(x: Tensor, state: Tensor, kernel: Tensor, cu_seqlens: Tensor) -> Tensor:
    from chela.ops.long_conv import toeplitz

    if not x.numel():
        return x.new_empty(x.shape)
    layout, history, taps, packing = _packing(x, state, kernel, cu_seqlens)
    out = toeplitz.forward(history, taps, taps[:, :0], layout.size, packing)
    return out.index_select(1, layout.tokens)


@torch.library.impl("chela::packed_long_conv_backward", "default")
def _backward_packed(
    grad: Tensor, x: Tensor, state: Tensor, kernel: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from chela.ops.long_conv import toeplitz

    if not x.numel():
        return torch.zeros_like(x), torch.zeros_like(state), torch.zeros_like(kernel)
    layout, history, taps, packing = _packing(x, state, kernel, cu_seqlens)
    grad = packed.fill(layout, grad, None)
    d_history, d_taps, _ = toeplitz.backward(grad, history, taps, taps[:, :0], layout.size, packing)
    d_kernel = kernel.new_zeros(kernel.shape)
    d_kernel[:, : taps.shape[1]] = d_taps
    return d_history.index_select(1, layout.tokens), d_history[0][layout.states], d_kernel


@torch.library.register_fake("chela::packed_long_conv")
def _forward_packed_shape(x: Tensor, state: Tensor, kernel: Tensor, cu_seqlens: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("chela::packed_long_conv_backward")
def _backward_packed_shapes(
    grad: Tensor, x: Tensor, state: Tensor, kernel: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape), kernel.new_empty(kernel.shape)


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_packed(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *torch.ops.chela.packed_long_conv_backward.default(grad, *ctx.saved_tensors), None


torch.library.register_autograd("chela::packed_long_conv", _differentiate_packed, setup_context=_save_packed)
