"""What every op does around its Triton kernels: how they are compiled, cut and called."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROOMY = 227 * 1024
"""Bytes of shared memory that a program may have on an H100 or a B200."""
TIGHT = 99 * 1024
"""And on a GeForce RTX 3090, 4090 or 5090; an A100 lies between, and gets what these get."""


def jit(*varying: str) -> Any:
    """Decorate a kernel that is compiled once for all values of these arguments, sizes as a rule."""
    import triton

    return triton.jit(do_not_specialize=[*varying])


def grid(kernel: Any, *programs: int) -> Any:
    """The kernel on so many programs along each axis, to be called with its arguments."""
    return kernel[programs]


def roomy(device: torch.device) -> bool:
    """Whether a program may have as much shared memory as on an H100, `ROOMY`; elsewhere tiles must do with `TIGHT`.

    So it is with compute capabilities 9 to 11, and where kernels are interpreted.
    """
    return device.type != "cuda" or 9 <= torch.cuda.get_device_capability(device)[0] <= 11


# What torch.compiler.assume_constant_result does; that would load the compiler, seconds, whenever chela is imported.
roomy._dynamo_marked_constant = True  # pyrefly: ignore


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor without gaps in memory, copied where it has some."""
    return None if tensor is None else tensor.contiguous()


def rows(tensor: Tensor) -> Tensor:
    """[N, width] with unit stride along the width; copied only where the rows are not evenly spaced in memory."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def ceil(a: int, b: int) -> int:
    """Pieces of size b that hold a."""
    return -(-a // b)


def power(n: int) -> int:
    """The smallest power of 2 of at least n."""
    return 1 << max(n - 1, 0).bit_length()


def no_second_derivative(op: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """What stands for the derivative of an op's backward pass, and refuses it."""

    def refuse(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(f"{op}'s Triton kernels have no second derivative: use impl='reference'")

    return refuse
