"""The cache of `generate`, made of a `ChelaState`."""

from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache

from chela.models.state import ChelaState


class ChelaCache(Cache):
    """What `generate` carries from token to token: a `ChelaState`, whose size the kernel bounds."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: ChelaState | None = None
        self.seen = 0  # positions read, padding too

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
        if self.state is not None:
            self.state = self.state.select(beam_idx)

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
