"""One step's gradients: slices of the batch added up, so that any slicing gives the same numbers to rounding."""

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from chela.data import Batch
from chela.models import ChelaState
from chela.training import distributed
from chela.training.carry import Carried
from chela.training.metrics import loss_and_hits


class Objective(nn.Module):
    """A model together with its loss: what DDP wraps, since it must see all of a forward pass."""

    def __init__(self, model: nn.Module, smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.smoothing = model, smoothing

    def forward(self, batch: Batch, state: ChelaState | None = None) -> tuple[Tensor, Tensor, ChelaState | None]:
        """Loss, hits and state of `loss_and_hits`."""
        return loss_and_hits(self.model, batch, state, self.smoothing)


def compute_gradients(
    objective: nn.Module,
    parts: list[Batch],
    targets: int,
    seed: int,
    step: int,
    device: torch.device,
    dtype: torch.dtype,
    carried: Carried | None = None,
) -> Tensor:
    """Leave the gradient of the mean loss over the global batch in the parameters.

    Each part contributes the sum over its labels divided by their number over all parts and processes. DDP averages
    over processes, hence the factor of the world size.

    Args:
        objective: wrapped by DDP or not.
        parts: this process's slices, on the CPU.
        targets: labels that count in the global batch.
        seed: of the run; with step, rank and part it seeds dropout, so a resumed run needs to know the step alone.
        step: number of the step.
        device: where to compute.
        dtype: compute type; bfloat16 runs under autocast, parameters and loss stay float32.
        carried: the state that the rows begin with; it is handed what comes after them.

    Returns:
        Sum of the loss and number of hits of this process, float64 [2] on `device`.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for number, part in enumerate(parts):
        last = number + 1 == len(parts)
        torch.manual_seed(dropout_seed(seed, step, distributed.rank(), number))
        alone = objective.no_sync() if isinstance(objective, DistributedDataParallel) and not last else nullcontext()
        with alone:
            batch = part.to(device, non_blocking=True)
            sums += add_gradients(objective, batch, distributed.size() / max(targets, 1), dtype, carried, number)
    return sums


def add_gradients(
    objective: nn.Module,
    batch: Batch,
    weight: float | Tensor,
    dtype: torch.dtype,
    carried: Carried | None = None,
    part: int = 0,
) -> Tensor:
    """Add the gradient of `weight` times the summed loss of one slice to the parameters' gradients.

    Args:
        objective: wrapped by DDP or not.
        batch: on the model's device.
        weight: of the sum; a tensor where a CUDA graph must see it change.
        dtype: compute type; bfloat16 runs under autocast.
        carried: the state that the rows begin with; it is handed what comes after them.
        part: number of the slice.

    Returns:
        Sum of the loss and number of hits, float64 [2].
    """
    with torch.autocast(batch.inputs.device.type, dtype, enabled=dtype != torch.float32):
        loss, hits, after = objective(batch, None if carried is None else carried.before(batch, part))
    if carried is not None and after is not None:
        carried.after(after)
    (loss * weight).backward()
    return torch.stack([loss.detach().double(), hits.double()])


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale gradients to a global norm of at most `limit` (0: leave them); returns the norm before, on the device."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    return torch.nn.utils.clip_grad_norm_(parameters, limit or torch.inf)


def dropout_seed(seed: int, step: int, rank: int, part: int) -> int:
    """A seed for torch's generators, different for each part of each step on each process."""
    return int(np.random.SeedSequence([seed, step, rank, part]).generate_state(1, np.uint64)[0] >> np.uint64(1))
