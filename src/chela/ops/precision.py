"""Dtypes of sums and of products.

Sums are kept in float64 for float64 and in float32 for everything narrower, whatever autocast would like.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums over tensors of `dtype` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x enters a product: autocast's where it is on for the device, but for float64."""
    kind = x.device.type
    if x.dtype != torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Keep autocast from narrowing the products inside a reference."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
