"""Padding: what a mask must be, and how it is kept out of sums over time."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def check_mask(mask: Tensor | None, x: Float[Tensor, "b t d"], state: object) -> None:
    """Refuse a mask that does not say of each position of `x` whether it is real, or that stands beside a state.

    Raises:
        ValueError: not bool [B, T], or a state is given too.
    """
    if mask is None:
        return
    if state is not None:
        raise ValueError(
            "mask and state exclude each other, for padding cannot stand between a state and its tokens: "
            "give the mask with the first piece alone"
        )
    if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        raise ValueError(f"mask must be bool [B, T] = {list(x.shape[:2])}; got {mask.dtype} {list(mask.shape)}")


def zero_padding(x: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"] | None) -> Float[Tensor, "b t d"]:
    """Zeros where the mask is False, as beyond the ends of a sequence."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)
