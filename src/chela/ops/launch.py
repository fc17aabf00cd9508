"""What every op does around its Triton kernels: how they are compiled, cut and called."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def jit(*varying: str) -> Any:
    """Decorate a kernel that is compiled once for all values of these arguments, sizes as a rule."""
    import triton

    return triton.jit(do_not_specialize=[*varying])


def grid(kernel: Any, *programs: int) -> Any:
    """The kernel on so many programs along each axis, to be called with its arguments."""
    return kernel[programs]


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor without gaps in memory, copied where it has some."""
    return None if tensor is None else tensor.contiguous()


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
