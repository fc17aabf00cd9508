"""State and packed documents around any form of the convolution: what every implementation does alike."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from chela.ops.documents import each_document

BLOCK = 128
"""Times in a block of a row, where one sequence of a channel lies in a row."""
Convolve = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""`convolve(history, kernel, reverse, length)` gives the last `length` >= 1 outputs; it cuts the kernels by
`within_reach` itself."""


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
        reverse = kernel[:, :0] if reverse_kernel is None else reverse_kernel
        some = x.shape[0] and x.shape[1]  # no FFT library takes none
        out = convolve(history, kernel, reverse, x.shape[1]) if some else history[:, history.shape[1] - x.shape[1] :]
        return out, history[:, max(0, history.shape[1] - kept) :].clone() if return_state else history[:, :0]

    def filled(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        out, after = whole(x, state)
        return out, F.pad(after, (0, 0, kept - after.shape[1], 0))

    if cu_seqlens is not None:
        out, state = each_document(filled, (x,), cu_seqlens, state)
    else:
        out, state = whole(x, state)
    return out, state if return_state else None


def within_reach(total: int, kernel: Tensor, reverse: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cut the kernels to the lags that reach one of `total` inputs from the last `length`."""
    return kernel[:, :total], reverse[:, : max(0, length - 1)]


def lengthen(gradient: Tensor, kernel: Tensor) -> Tensor:
    """Zeros for the lags that reach no input."""
    return F.pad(gradient, (0, more)) if (more := kernel.shape[1] - gradient.shape[1]) else gradient


def places(total: int, length: int) -> int:
    """Places in a row for `total` inputs, of which `length` are no state: whole blocks of both."""
    return (-((length - total) // BLOCK) - -length // BLOCK) * BLOCK
