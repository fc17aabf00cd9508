"""Packed documents in rows of blocks: each begins a block of its own, after whole blocks that end with its state.

All documents then go through one convolution whose rows know how many blocks of their own document lie before and
after them; nothing is copied to the host, and a document's numbers never depend on its neighbours.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Where everything lies on an axis of `size` times, a multiple of the block."""

    tokens: Tensor
    """int64 [T]: time of each token."""
    states: Tensor
    """int64 [N, S]: time of each carried input."""
    before: Tensor
    """int32 [size / M]: blocks of the same document before a block."""
    after: Tensor
    """int32 [size / M]: and after it."""
    size: int


def lay_out(cu_seqlens: Tensor, length: int, carried: int, block: int) -> Layout:
    """Place N documents of `length` tokens in all, each after `carried` inputs, in blocks of `block` times."""
    ends = cu_seqlens.to(torch.int64)
    starts, documents = ends[:-1], ends.shape[0] - 1
    state_blocks = -(-carried // block)
    blocks = state_blocks + (ends.diff() + block - 1) // block  # [N]
    stops = blocks.cumsum(0)
    count = length // block + documents * (state_blocks + 1)  # enough for any cut
    begin = (stops - blocks + state_blocks) * block  # [N], where the tokens start
    t = torch.arange(length, device=ends.device)
    of_token = torch.searchsorted(ends[1:], t, right=True)
    tokens = begin[of_token] + t - starts[of_token]
    states = begin[:, None] - carried + torch.arange(carried, device=ends.device)
    c = torch.arange(count, device=ends.device)
    of_block = torch.searchsorted(stops, c, right=True).clamp_(max=documents - 1)
    used = c < stops[-1]
    before = torch.where(used, c - (stops - blocks)[of_block], 0)
    after = torch.where(used, stops[of_block] - 1 - c, 0)
    return Layout(tokens, states, before.to(torch.int32), after.to(torch.int32), count * block)


def fill(layout: Layout, x: Tensor, state: Tensor | None) -> Tensor:
    """Tokens [1, T, D] and states [N, S, D] at their places [1, size, D], zeros elsewhere."""
    out = x.new_zeros(1, layout.size, x.shape[2])
    out[0].index_copy_(0, layout.tokens, x[0])
    if state is not None:
        out[0].index_copy_(0, layout.states.flatten(), state.flatten(0, 1))
    return out


def last_inputs(x: Tensor, state: Tensor | None, cu_seqlens: Tensor, kept: int) -> Tensor:
    """The last `kept` inputs of each document and its state [N, kept, D], with zeros in front where fewer came."""
    ends = cu_seqlens.to(torch.int64)
    source = ends[1:, None] - kept + torch.arange(kept, device=x.device)  # [N, kept]
    in_document = source >= ends[:-1, None]
    # places without an input of their own read spread ones, so that no address gathers all the zeros of the gradient
    after = x[0][source.remainder(max(x.shape[1], 1))] if x.shape[1] else x.new_zeros(*source.shape, x.shape[2])
    after = torch.where(in_document[..., None], after, 0)
    if state is None or not state.shape[1]:
        return after
    place = source - ends[:-1, None] + state.shape[1]
    rows = torch.arange(state.shape[0], device=x.device)[:, None]
    carried = torch.where((~in_document & (place >= 0))[..., None], state[rows, place.remainder(state.shape[1])], 0)
    return after + carried
