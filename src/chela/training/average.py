"""Averaged weights: what is validated, tested and kept in place of the weights that are trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The exponential moving average of a model's weights and running statistics (Polyak and Juditsky 1992).

    After step t (from 0) it is `kept * average + (1 - kept) * weights` with `kept = min(decay, (1 + t) / (10 + t))`, so
    that the drawn weights are soon forgotten. A high rate then keeps on finding what generalises while its noise is
    averaged away. Weights of a skipped update count once more.

    Args:
        model: on its device; its weights stay what is trained.
        decay: share kept after many steps, in (0, 1): 0.999 averages over about 1,000 steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._trained = {
            name: tensor
            for name, tensor in model.state_dict(keep_vars=True).items()
            if tensor.is_floating_point()  # a count of batches has no average
        }
        self.tensors: dict[str, Tensor] = {name: x.detach().clone() for name, x in self._trained.items()}

    @torch.no_grad()
    def follow(self, step: int | Tensor) -> None:
        """Take in the weights after a step; its number may be a float64 tensor inside a CUDA graph."""
        averages, trained = list(self.tensors.values()), list(self._trained.values())
        if not isinstance(step, Tensor):
            step = torch.full((), float(step), dtype=torch.float64, device=averages[0].device)
        share = 1 - ((1 + step) / (10 + step)).clamp(max=self.decay)
        change = torch._foreach_sub(trained, averages)
        torch._foreach_mul_(change, share.to(averages[0].dtype))  # pyrefly: ignore
        torch._foreach_add_(averages, change)

    @contextmanager
    def in_the_model(self) -> Iterator[None]:
        """Let the model have the average for a while: to be evaluated, or to be saved."""
        kept = {name: x.detach().clone() for name, x in self._trained.items()}
        try:
            self._set(self.tensors)
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, tensor in self._trained.items():  # in place: a CUDA graph knows the weights by their address
            tensor.copy_(values[name])
