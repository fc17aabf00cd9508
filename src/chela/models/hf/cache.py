"""The cache of `generate`, made of a `ChelaState`."""

from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache

from chela.models.causal_lm import CausalLM
from chela.models.decoding import Decoder
from chela.models.state import ChelaState
from chela.ops.impl import Impl


class ChelaCache(Cache):
    """What `generate` carries from token to token: a `ChelaState`, whose size the kernel bounds.

    From the first single token on, a `Decoder` moves it on, whose steps for a merged model are a CUDA graph on a GPU.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._state: ChelaState | None = None
        self._decoder: Decoder | None = None
        self.seen = 0  # positions read, padding too

    @property
    def state(self) -> ChelaState | None:
        """What all tokens so far have led to; None before the first."""
        return self._state if self._decoder is None else self._decoder.state

    @state.setter
    def state(self, state: ChelaState | None) -> None:
        self._state, self._decoder = state, None

    def decoder(self, model: CausalLM, impl: Impl, record: bool) -> Decoder:
        """What takes single tokens from here on; after the first token."""
        if self._decoder is None or self._decoder.impl != impl:
            assert self.state is not None
            self._decoder, self._state = Decoder(model, self.state, impl=impl, record=record), None
        return self._decoder

    def __deepcopy__(self, memo: dict[int, Any]) -> "ChelaCache":
        """A place to come back to: the state is copied, the decoder's model and recording are not."""
        twin = ChelaCache()
        twin.state, twin.seen = None if self.state is None else self.state.clone(), self.seen
        return twin

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions read so far, padding included."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen = None, 0

    def reorder_cache(self, beam_idx: Int[Tensor, " n"]) -> None:
        """Take rows [N] of the batch, repeats allowed: what beam search asks for."""
        if self._decoder is not None:
            self._decoder.select(beam_idx)
        elif self._state is not None:
            self._state = self._state.select(beam_idx)

    def batch_select_indices(self, indices: Int[Tensor, " n"]) -> None:
        """Take rows [N] of the batch."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, the copies side by side."""
        if self.state is not None:
            self.state = self.state.map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to go back: a state does not know what it was before.

        Raises:
            ValueError: always, but for 0 tokens.
        """
        if tokens_to_remove:
            raise ValueError("a ChelaCache cannot go back over tokens: keep a copy of the cache (copy.deepcopy)")

    @property
    def batch_size(self) -> int:
        """Number of rows, -1 before the first token."""
        return -1 if self.state is None else self.state.batch_size

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back: no."""
        return False
