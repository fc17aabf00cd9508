"""Truncated backpropagation through time: the state each row of the batch hands from one step to the next."""

import torch
from torch import Tensor, nn

from chela.data import Batch
from chela.models import CausalLM, ChelaState


class Carried:
    """Every row's state, in buffers that stay where they are (a CUDA graph reads and writes them).

    A step reads it with `before` and hands in what came out with `after`; `keep` then makes that the state of the
    next step, unless the step was not finite. It starts as zeros in its final shape, which is no past at all.

    Args:
        model: the language model, of CHELA's layers, whose state has a fixed size; on its device.
        rows: of the batch, over all slices.
        dtype: compute type of the training.
    """

    def __init__(self, model: nn.Module, rows: int, dtype: torch.dtype) -> None:
        assert isinstance(model, CausalLM), "checked with the task"
        assert model.config.mixer == "chela", "checked with the task"
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        # after as many tokens as the kernel has taps the state has all its inputs, and no token makes it larger
        tokens = torch.zeros(1, max(1, model.config.kernel_length), dtype=torch.int64, device=device)
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            _, state = model.backbone(tokens, return_state=True)
        model.train(was_training)
        assert state is not None
        self.state: ChelaState = state.map(lambda x: x.new_zeros(rows, *x.shape[1:]))
        self._rows, self._after = rows, list[ChelaState]()

    def before(self, batch: Batch, part: int = 0) -> ChelaState:
        """The state that a slice of the batch begins with: zeros in its fresh rows.

        Args:
            batch: the slice, on the device.
            part: its number.
        """
        assert batch.fresh is not None, "a source that carries says which rows are fresh"
        fresh, count = batch.fresh, len(batch.inputs)

        def rows(x: Tensor) -> Tensor:
            return x[part * count : (part + 1) * count].masked_fill(fresh.view(-1, *[1] * (x.ndim - 1)), 0)

        return self.state.map(rows)

    def after(self, state: ChelaState) -> None:
        """Hand in the state after the next slice of the step under way."""
        self._after.append(state.detach())

    def keep(self, bad: Tensor) -> None:
        """Make what was handed in the state, but leave it as it was where `bad`, without dimensions, is not zero."""
        slices = [state.tensors() for state in self._after]
        for buffer, *parts in zip(self.state.tensors(), *slices, strict=True):
            buffer.copy_(torch.where(bad > 0, buffer, torch.cat(parts)))
        self.forget()

    def forget(self) -> None:
        """Drop what was handed in: the step is only looked at."""
        self._after.clear()

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything, by name, for a checkpoint."""
        return {f"{number:04d}": tensor for number, tensor in enumerate(self.state.tensors())}
