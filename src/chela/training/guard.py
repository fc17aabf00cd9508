"""Numbers that are no longer finite: no update from them, no checkpoint of them, and the name of where they began."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from chela.config import ModelConfig
from chela.data import Batch
from chela.training import distributed

ADVICE = " (try a lower optim.lr, a longer optim.warmup or a smaller optim.clip)"


def batch_norm_advice(model: ModelConfig) -> str:
    """What may help where training is finite and validation is not: the difference is the running statistics.

    Batch norm lets single positions grow, by its batch's statistics they still pass, by the running ones they do not.
    """
    if model.norm != "batch":
        return ""
    tamer = ", model.feed_forward bounded-swiglu" if model.feed_forward == "swiglu" else ""
    return f" (batch norm's running statistics no longer fit: try a lower optim.lr{tamer} or model.norm layer)"


class NonFinite(ValueError):
    """Training met infinity or NaN; the message says where it began."""


class Guard:
    """Remembers, on the device, the first step whose loss or gradient was not finite.

    From that step on it tells the optimiser to leave the weights alone: nothing waits for the GPU at each step, and
    when the loop looks, the weights are still those of the step to be explained.
    """

    def __init__(self, device: torch.device) -> None:
        self.bad_step = torch.full((), -1.0, dtype=torch.float64, device=device)  # the first one, or -1

    def watch(self, step: int | Tensor, loss: Tensor, norm: Tensor) -> Tensor:
        """Note a step (a float64 tensor inside a CUDA graph); returns AdamW's `found_inf`: 1 (no update) or 0."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        now = step if isinstance(step, Tensor) else float(step)
        self.bad_step.copy_(torch.where((self.bad_step < 0) & bad, now, self.bad_step))
        return (self.bad_step >= 0).float()

    def first(self) -> int | None:
        """The first bad step, or None (waits for the device)."""
        step = int(self.bad_step)
        return None if step < 0 else step


def explain(model: nn.Module, parts: list[Batch], backward: Callable[[], Tensor]) -> str:
    """Repeat a bad step under watch and name the first place that went non-finite, in words.

    Args:
        model: with the weights the step began with.
        parts: this process's slices of the batch.
        backward: computes this process's loss and its gradients, without DDP.

    Returns:
        The finding of the first rank that has one: the data, a layer of the forward pass, or a parameter's gradient.
    """
    model.zero_grad()
    with _watched(model) as found:
        loss = backward()
    finding = ""
    if not _finite([[part.inputs, part.second] for part in parts]):
        finding = "already in the examples themselves"
    elif found:
        finding = f"first in the output of {found[0]}{ADVICE}"
    elif not torch.isfinite(loss):
        finding = f"in the loss; every layer's output is finite{ADVICE}"
    here = distributed.gather_texts(finding)
    if not any(here):
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
        finding = f"first in the gradient of {bad[0]}, after a finite forward pass{ADVICE}" if bad else ""
        here = distributed.gather_texts(finding)
    return next((text for text in here if text), f"in the norm of finite gradients, which overflows{ADVICE}")


def check_weights(model: nn.Module) -> None:
    """Refuse to keep weights that are not finite.

    Raises:
        NonFinite: names the first such parameter or buffer.
    """
    for name, value in model.state_dict().items():
        if not torch.isfinite(value).all():
            raise NonFinite(f"{name} is no longer finite after an update: try a lower optim.lr")


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of layers, in the order they finish, that turn finite inputs into non-finite outputs."""
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if found or _finite(output):
                return
            if _finite(args) and _finite(kwargs):
                found.append(name)
            else:  # it was handed the bad numbers: they arose between layers, in the one around it
                found.append(f"{name.rpartition('.')[0] or 'the model'} (before {name})")

        return look

    hooks = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in hooks:
            handle.remove()


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
