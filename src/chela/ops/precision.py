"""Where sums are kept: float64 for float64, float32 for everything narrower, whatever autocast would like."""

from contextlib import AbstractContextManager, nullcontext

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums over tensors of `dtype` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Keep autocast from narrowing the products inside a reference."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
