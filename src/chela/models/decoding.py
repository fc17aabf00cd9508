"""One token after another on a state of one's own: on a GPU each step is one CUDA graph, replayed."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from chela.layers import ChelaBlock
from chela.layers.long_kernel import FoldedKernel
from chela.models.causal_lm import CausalLM
from chela.models.fused_step import fused_step
from chela.models.state import ChelaState
from chela.models.transformer import KeyValues, with_room
from chela.ops.impl import Impl
from chela.ops.long_conv.online import OnlineState, advance


class Decoder:
    """Steps of a causal model from a state, which it takes over and changes in place.

    On a GPU a step's kernels are small, and launching them one by one takes longer than running them. Here a merged
    model's step is recorded once and replayed, fused, too, unless impl="reference" (`fused_step`, with the weights as
    they are now): all that changes lies in the state, at addresses that stay. What the end of a block of the online
    convolution takes, now and then, is launched in between, and a Transformer's step is recorded again when the room
    for its keys is full. The numbers are those of `CausalLM.step` to rounding.

    Args:
        model: in evaluation mode; merged, if a step is to be recorded.
        state: of `CausalLM.prefill`, taken over; give a `clone` to keep it.
        impl: implementation of the ops.
        record: False takes each step block by block and launches it kernel by kernel on a GPU, too: for a model spread
            over several.
        room: steps to come, if known: so much room a Transformer's keys and values get at once.

    Raises:
        ValueError: the state is of another model.
    """

    def __init__(
        self, model: CausalLM, state: ChelaState, *, impl: Impl = "auto", record: bool = True, room: int = 0
    ) -> None:
        self.impl: Impl = impl
        self._model = model
        self._state = model.online(state, room=room) if model.config.merged else state
        self._taps = [_folded(block) for block in model.backbone.blocks]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._fused = None
        if record and model.config.merged:
            self._state = self._state.map(Tensor.contiguous)
            self._fused = fused_step(model, self._state, impl)
        # A step that is not fused changes a Transformer's state in more than its tensors.
        self._recorded = record and model.config.merged and (model.config.mixer == "chela" or self._fused is not None)
        self._written = 0  # keys and values that the state does not count yet
        self._token, self._logits = torch.zeros(0), torch.zeros(0)  # what a recorded step reads and writes

    @torch.no_grad()
    def step(self, token: Int[Tensor, " b"]) -> Float[Tensor, "b vocab"]:
        """Read one token a row, int64 [B]; logits [B, vocab] of the next, which the next step may overwrite."""
        if self._fused is None and not (self._recorded and token.is_cuda):
            logits, self._state = self._model.step(token, self._state, impl=self.impl)
            return logits
        self._make_room()
        if token.is_cuda:
            if self._graph is None:
                self._record(token)
                assert self._graph is not None
            self._token.copy_(token)
            self._graph.replay()
        else:
            self._token = token
            self._logits = self._emit(self._state)
        self._advance()
        return self._logits

    @property
    def state(self) -> ChelaState:
        """What all tokens so far have led to; the next step may change it in place."""
        if self._written:
            self._count(self._written)
        return self._state

    @torch.no_grad()
    def select(self, rows: Int[Tensor, " n"]) -> None:
        """Take rows of the batch, int64 [N], repeats allowed: what beam search asks for. N = B keeps the recording."""
        selected = self.state.select(rows)
        if self._graph is None or selected.batch_size != self._state.batch_size:
            self._state, self._graph = selected, None
            return
        for place, value in zip(self._state.tensors(), selected.tensors(), strict=True):
            place.copy_(value)

    def rewind(self, tokens: int) -> None:
        """Forget a Transformer's last tokens, so many a row; the recording is kept.

        Raises:
            ValueError: they are not there, or the model is CHELA, whose sums keep no single tokens: keep a `clone`.
        """
        first = self.state.layers[0]
        if not isinstance(first, KeyValues) or not first.in_place:
            raise ValueError("only a merged Transformer's state can go back: keep a clone of CHELA's state instead")
        if not 0 <= tokens <= first.length:
            raise ValueError(f"the state holds {first.length} tokens: it cannot forget {tokens}")
        self._count(-tokens)
        if self._fused is not None:
            self._fused.go_to(self._state)

    def _count(self, tokens: int) -> None:
        """So many more keys and values count as written."""
        self._state = ChelaState(
            tuple(
                layer._replace(length=layer.length + tokens) if isinstance(layer, KeyValues) else layer
                for layer in self._state.layers
            )
        )
        self._written = 0

    def _record(self, token: Tensor) -> None:
        """Compile on a copy of the state, then record without running."""
        self._token = token.clone()
        # A Transformer's step writes what the first replay writes again: its state, large as it is, needs no copy.
        spare = self.state if isinstance(self._state.layers[0], KeyValues) else self._state.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._emit(spare)
        torch.cuda.current_stream().wait_stream(aside)
        if self._fused is not None:
            self._fused.go_to(self._state)
        self._graph = torch.cuda.CUDAGraph()
        # Casts of weights that autocast keeps are freed at the end of its context: the recording makes its own.
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        uncached = torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False)
        with uncached, torch.cuda.graph(self._graph):
            self._logits = self._emit(self._state)

    def _emit(self, state: ChelaState) -> Tensor:
        """A step that leaves its new state where the old one was, the ends of blocks left to `_advance`."""
        if self._fused is not None:
            return self._fused(self._token, state)
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
        """Count the token where Python does, and sum what the end of a block adds to the outputs ahead."""
        if isinstance(self._state.layers[0], KeyValues):
            self._written += 1
            return
        for taps, layer in zip(self._taps, self._state.layers, strict=True):
            long = layer.convolution.long  # pyrefly: ignore
            if isinstance(long, OnlineState):
                assert taps is not None
                advance(long, taps)

    def _make_room(self) -> None:
        """Where a Transformer's keys and values have taken all places, move to twice as many and record anew."""
        first = self._state.layers[0]
        if isinstance(first, KeyValues) and first.length + self._written == first.keys.shape[1]:
            self._graph = None
            self._state = ChelaState(
                tuple(with_room(layer) if isinstance(layer, KeyValues) else layer for layer in self.state.layers)
            )


def _folded(block: nn.Module) -> Tensor | None:
    """The long kernel of a merged block, [D, L]."""
    kernel = block.layer.convolution.kernel if isinstance(block, ChelaBlock) else None
    return kernel.past.detach() if isinstance(kernel, FoldedKernel) else None


def _online(state: ChelaState) -> list[OnlineState]:
    longs = [layer.convolution.long for layer in state.layers]  # pyrefly: ignore
    return [long for long in longs if isinstance(long, OnlineState)]
