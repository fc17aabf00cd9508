"""AdamW: which parameters decay and at which rate each group learns, as functions of names and of the step."""

import math

import torch
from torch import Tensor, nn

from chela.config import OptimConfig

UNDECAYED = ("norm", "embed", "short_weight")


def parameter_group(name: str, parameter: nn.Parameter) -> str:
    """Name the group of a parameter: "kernel" (convolution kernels), "plain" (no decay) or "matrix".

    Plain are norms, biases, gains, embeddings, the taps of the short convolution, and whatever has less than two
    dimensions.
    """
    if "kernel." in name:
        return "kernel"
    if parameter.ndim < 2 or name.endswith(("bias", "gain")) or any(word in name for word in UNDECAYED):
        return "plain"
    return "matrix"


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the groups of `parameter_group`; a group's peak rate is its entry "peak".

    The fused form alone can skip an update without asking the GPU (see `guard`). On a GPU the rates are tensors, so
    that a CUDA graph of the update sees them change.
    """
    groups: dict[str, list[nn.Parameter]] = {"kernel": [], "plain": [], "matrix": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter_group(name, parameter)].append(parameter)
    rates = {"kernel": config.kernel_lr or config.lr, "plain": config.lr, "matrix": config.lr}
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "name": name,
                "peak": rates[name],
                "lr": torch.tensor(rates[name], device=device) if on_gpu else rates[name],
                "weight_decay": config.weight_decay if name == "matrix" else 0.0,
            }
            for name, parameters in groups.items()
            if parameters
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
        capturable=on_gpu,
    )


def schedule(config: OptimConfig, step: int, steps: int) -> float:
    """Share of the peak rate at a step (0 to steps - 1).

    A straight line up to 1 over the warm-up; then a straight line or half a cosine that would reach zero at `steps`, or
    constant.
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / (steps - config.warmup)  # 0 <= done < 1
    if config.schedule == "linear":
        return 1 - done
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group's rate to a share of its peak."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(group["peak"] * share)
        else:
            group["lr"] = group["peak"] * share
