"""Checks that the public faces share. Each raises `ValueError` with one line a caller can act on."""

import torch
from torch import Tensor


def check_alike(data: dict[str, Tensor], parameters: dict[str, Tensor | None]) -> None:
    """Check that tensors can be computed with together.

    Args:
        data: tensors by name that must share device and floating dtype.
        parameters: tensors by name that must share the device; any floating dtype no wider than the sums' is fine.

    Raises:
        ValueError: naming the first tensor that does not fit.
    """
    first, like = next(iter(data.items()))
    if not like.is_floating_point():
        raise ValueError(f"{first} must be a floating-point tensor; got {like.dtype}")
    for name, tensor in data.items():
        if tensor.dtype != like.dtype:
            raise ValueError(
                f"{name} must have the dtype of {first}, {like.dtype}; got {tensor.dtype}: cast one of them"
            )
    for name, tensor in (data | parameters).items():
        if tensor is None:
            continue
        if tensor.device != like.device:
            raise ValueError(f"{name} must be on the device of {first}, {like.device}; got {tensor.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor; got {tensor.dtype}")
        if tensor.dtype == torch.float64 and like.dtype != torch.float64:
            raise ValueError(f"{name} is float64 but {first} is {like.dtype}: cast {name} to float32")


def check_shape(name: str, tensor: Tensor, wanted: tuple[int, ...], legend: str) -> None:
    """Check that `tensor` has exactly the shape `wanted`, written `legend` (such as "[D, W]") in the message.

    Raises:
        ValueError: it has not.
    """
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{name} must be {legend} = {list(wanted)}; got {list(tensor.shape)}")


def check_counts(mask: Tensor | None, name: str, like: Tensor) -> None:
    """Check that a mask says of each row of `like` [..., width], called `name`, whether it counts; None is fine.

    Raises:
        ValueError: not bool [...] on the same device.
    """
    rows = like.shape[:-1]
    if mask is not None and (mask.dtype != torch.bool or mask.shape != rows or mask.device != like.device):
        got = f"{mask.dtype} {list(mask.shape)} on {mask.device}"
        raise ValueError(f"mask must be bool [...] = {list(rows)} on the device of {name}, {like.device}; got {got}")


def check_causal_only(causal: bool, state: Tensor | None, return_state: bool, cu_seqlens: Tensor | None) -> None:
    """Refuse what has no meaning without a direction of time.

    Raises:
        ValueError: a state or packed documents without `causal=True`.
    """
    if causal:
        return
    for name, given in (
        ("state", state is not None),
        ("return_state", return_state),
        ("cu_seqlens", cu_seqlens is not None),
    ):
        if given:
            raise ValueError(f"{name} needs causal=True")


def check_documents(cu_seqlens: Tensor, like: Tensor) -> None:
    """Check the document boundaries of a packed batch `like` [1, T, ...].

    The contents are looked at only on the CPU and outside of `torch.compile`: on a GPU that would stall the queue.

    Raises:
        ValueError: cu_seqlens is not int32 [N+1] from 0 to T without decrease, or the batch is not 1.
    """
    batch, length = like.shape[:2]
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must be int32 [N+1], N >= 1; got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if cu_seqlens.device != like.device:
        raise ValueError(f"cu_seqlens must be on the inputs' device, {like.device}; got {cu_seqlens.device}")
    if batch != 1:
        raise ValueError(f"cu_seqlens needs batch size 1: pack the documents along time; got batch size {batch}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != length:
            raise ValueError(
                f"cu_seqlens must go from 0 to T = {length}; got {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
            )
        if (cu_seqlens.diff() < 0).any():
            raise ValueError("cu_seqlens must never decrease: it holds the documents' ends, in order")
