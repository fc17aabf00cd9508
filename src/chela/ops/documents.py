"""Packed documents in the reference implementations: one after the other, each alone."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def each_document(
    run: Callable[..., tuple[Tensor, Tensor]], tensors: tuple[Tensor, ...], cu_seqlens: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run an op on every document of a packed batch by itself, so that no number depends on a neighbour.

    Args:
        run: `run(*tensors, state) -> (out, state)` on one document, with a batch of 1.
        tensors: packed inputs [1, T, ...].
        cu_seqlens: int32 [N+1], ends of the documents; empty ones are fine.
        state: [N, ...], or None.

    Returns:
        Packed output [1, T, ...] and the states after each document [N, ...].
    """
    outs, states = [], []
    for n, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        document = (tensor[:, start:stop] for tensor in tensors)
        out, after = run(*document, None if state is None else state[n : n + 1])
        outs.append(out)
        states.append(after)
    return torch.cat(outs, dim=1), torch.cat(states, dim=0)
