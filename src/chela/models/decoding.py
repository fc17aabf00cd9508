"""One token after another on a state of one's own: on a GPU each step is one CUDA graph, replayed."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chela.layers import ChelaBlock
from chela.models.causal_lm import CausalLM
from chela.models.state import ChelaState
from chela.ops.impl import Impl
from chela.ops.long_conv.online import OnlineState, advance


class Decoder:
    """Steps of a causal model from a state, which it takes over and changes in place.

    On a GPU a step's kernels are small, and launching them one by one takes longer than running them. Here a step is
    recorded once and replayed: all that changes lies in the state, at addresses that stay. What the end of a block of
    the online convolution takes, now and then, is launched in between. The numbers are those of `CausalLM.step`.

    Args:
        model: in evaluation mode; merged, if a step is to be recorded.
        state: of `CausalLM.prefill`, taken over; give a `clone` to keep it.
        impl: implementation of the ops.
        record: False launches each step kernel by kernel on a GPU, too: for a model spread over several.

    Raises:
        ValueError: the state is of another model.
    """

    def __init__(self, model: CausalLM, state: ChelaState, *, impl: Impl = "auto", record: bool = True) -> None:
        self.impl: Impl = impl
        self._model = model
        self._state = model.online(state) if model.config.merged else state
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded = record and model.config.mixer == "chela" and model.config.merged
        self._token, self._logits = torch.zeros(0), torch.zeros(0)  # what a recorded step reads and writes

    @torch.no_grad()
    def step(self, token: Int[Tensor, " b"]) -> Float[Tensor, "b vocab"]:
        """Read one token a row, int64 [B]; logits [B, vocab] of the next, which the next step may overwrite."""
        if not (self._recorded and token.is_cuda):
            logits, self._state = self._model.step(token, self._state, impl=self.impl)
            return logits
        if self._graph is None:
            self._record(token)
            assert self._graph is not None
        self._token.copy_(token)
        self._graph.replay()
        self._advance()
        return self._logits

    @property
    def state(self) -> ChelaState:
        """What all tokens so far have led to; the next step may change it in place."""
        return self._state

    @torch.no_grad()
    def select(self, rows: Int[Tensor, " n"]) -> None:
        """Take rows of the batch, int64 [N], repeats allowed: what beam search asks for. N = B keeps the recording."""
        selected = self._state.select(rows)
        if self._graph is None or selected.batch_size != self._state.batch_size:
            self._state, self._graph = selected, None
            return
        for place, value in zip(self._state.tensors(), selected.tensors(), strict=True):
            place.copy_(value)

    def _record(self, token: Tensor) -> None:
        """Compile on a copy of the state, then record without running."""
        self._token = token.clone()
        spare, aside = self._state.clone(), torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._emit(spare)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._emit(self._state)

    def _emit(self, state: ChelaState) -> Tensor:
        """A step that leaves its new state where the old one was, the ends of blocks left to `_advance`."""
        held = [long for long in _online(state) if not long.held]
        for long in held:
            long.held = True
        logits, after = self._model.step(self._token, state, impl=self.impl)
        for long in held:
            long.held = False
        for place, value in zip(state.tensors(), after.tensors(), strict=True):
            if place is not value:
                place.copy_(value)
        return logits

    def _advance(self) -> None:
        for block, layer in zip(self._model.backbone.blocks, self._state.layers, strict=True):
            long = layer.convolution.long  # pyrefly: ignore
            if isinstance(long, OnlineState):
                assert isinstance(block, ChelaBlock)
                kernel = block.layer.convolution.kernel
                assert kernel is not None
                advance(long, kernel().forward)


def _online(state: ChelaState) -> list[OnlineState]:
    longs = [layer.convolution.long for layer in state.layers]  # pyrefly: ignore
    return [long for long in longs if isinstance(long, OnlineState)]
