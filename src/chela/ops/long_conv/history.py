"""State and packed documents around any form of the convolution: what every implementation does alike."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from chela.ops.documents import each_document

Convolve = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""`convolve(history, kernel, reverse, length)` gives the last `length` >= 1 outputs; arguments as in `fft_conv`."""


def with_history(
    convolve: Convolve,
    x: Tensor,
    kernel: Tensor,
    *,
    reverse_kernel: Tensor | None,
    state: Tensor | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Run the op by one form of the convolution; arguments as in `chela.ops.long_conv`, already checked."""
    kept = kernel.shape[1] - 1

    def whole(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        history = x if state is None else torch.cat([state, x], dim=1)
        out = _within_reach(convolve, history, kernel, reverse_kernel, x.shape[1])
        return out, history[:, max(0, history.shape[1] - kept) :].clone() if return_state else history[:, :0]

    def filled(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        out, after = whole(x, state)
        return out, F.pad(after, (0, 0, kept - after.shape[1], 0))

    if cu_seqlens is not None:
        out, state = each_document(filled, (x,), cu_seqlens, state)
    else:
        out, state = whole(x, state)
    return out, state if return_state else None


def _within_reach(convolve: Convolve, history: Tensor, kernel: Tensor, reverse: Tensor | None, length: int) -> Tensor:
    """Cut the kernels to the lags that reach an input."""
    if length == 0:
        return history[:, :0]
    kernel = kernel[:, : history.shape[1]]
    return convolve(history, kernel, kernel[:, :0] if reverse is None else reverse[:, : length - 1], length)
