"""What tests and benchmarks need to trust an op: values with every gradient, and an error budget.

The budget is computed, not tuned. A plain implementation in the low precision itself, run on the same inputs, shows
how much error that precision costs; an op may have twice that, plus one rounding of the largest entry:

    max |op - high| <= 2 (max |plain low - high| + eps max |high|)

where `high` is the plain implementation in float64. The plain implementation of linear attention is a form of its
`reference.py` called directly on low-precision tensors, so that scores and states are rounded as in a kernel that
feeds matrix units; in float32 it is the same call in float32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chela.ops.random_inputs import draw


def values_and_gradients(
    op: Callable[..., Tensor | tuple[Tensor | None, ...]],
    inputs: dict[str, Tensor],
    *,
    seed: int = 0,
    rounded_to: torch.dtype | None = None,
    gradients: bool = True,
) -> dict[str, Tensor]:
    """Run `op(**inputs)` forward and, asked for, backward with random cotangents on every output.

    Args:
        op: returns a tensor or a tuple of tensors; None among them is left out.
        inputs: by argument name; gradients are taken for all.
        seed: of the cotangents, which are the same for every dtype and device.
        rounded_to: round the cotangents to this dtype first, so that runs in wider dtypes get the same ones.
        gradients: False for an op that has none.

    Returns:
        "out", "state" (further outputs: "output 2", ...) and "grad NAME" for every input, detached.
    """
    leaves = {name: tensor.detach().requires_grad_(gradients) for name, tensor in inputs.items()}
    outputs = op(**leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    names = ["out", "state", *(f"output {n}" for n in range(2, len(outputs)))]
    named = {name: tensor for name, tensor in zip(names, outputs, strict=False) if tensor is not None}
    values = {name: tensor.detach() for name, tensor in named.items()}
    if not gradients:
        return values
    cotangents = []
    for n, tensor in enumerate(named.values()):
        cotangent = draw(*tensor.shape, seed=1000 + seed + n, dtype=rounded_to or tensor.dtype, device=tensor.device)
        cotangents.append(cotangent.to(tensor.dtype))
    grads = torch.autograd.grad([*named.values()], [*leaves.values()], cotangents, materialize_grads=True)
    return values | {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Euclidean norm of the difference over that of `expected`, in float64; 0 for two zeros or two empty tensors."""
    difference = (actual.detach().double() - expected.detach().double()).norm().item()
    return difference / expected.detach().double().norm().item() if difference else 0.0


def error_budget(low_precision: Tensor, high_precision: Tensor, dtype: torch.dtype) -> float:
    """Largest absolute error an op with outputs in `dtype` may have; the formula is the module's.

    Args:
        low_precision: result of the plain implementation in low precision.
        high_precision: its result in float64.
        dtype: of the op's output; the coarser of it and low_precision's gives eps.
    """
    if not high_precision.numel():
        return 0.0
    eps = max(torch.finfo(dtype).eps, torch.finfo(low_precision.dtype).eps)
    return 2 * (_max_error(low_precision, high_precision) + eps * high_precision.abs().max().item())


def assert_within_budget(
    actual: Tensor, low_precision: Tensor, high_precision: Tensor, name: str = "output", *, budget: float | None = None
) -> None:
    """Check an op's result against the plain implementation's.

    Args:
        actual: the op's result.
        low_precision: the plain implementation's in low precision.
        high_precision: the plain implementation's in float64.
        name: for the message.
        budget: computed from more than these two; theirs when left out.

    Raises:
        AssertionError: another shape, a number that is not finite where it should be, or an error past the budget.
    """
    if actual.shape != high_precision.shape:
        raise AssertionError(f"{name}: shape {list(actual.shape)} instead of {list(high_precision.shape)}")
    if not torch.isfinite(actual).all():
        count = int((~torch.isfinite(actual)).sum())
        raise AssertionError(f"{name}: {count} of {actual.numel()} entries are not finite")
    if budget is None:
        budget = error_budget(low_precision, high_precision, actual.dtype)
    error = _max_error(actual, high_precision)
    if not error <= budget:
        relative = relative_error(actual, high_precision)
        raise AssertionError(f"{name}: largest error {error:.3g}, budget {budget:.3g} (relative error {relative:.3g})")


def check_op(
    op: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: dict[str, Tensor],
    *,
    seed: int = 0,
    draws: int = 3,
    gradients: bool = True,
) -> dict[str, float]:
    """Hold every value and gradient of `op` to the budget set by `plain` on the same inputs.

    Args:
        op: what is tested, called as `op(**inputs)`.
        plain: the plain implementation; it must run in the inputs' own precision and in float64.
        inputs: by argument name. The first one's dtype is the low precision.
        seed: of the cotangents.
        draws: of cotangents for the plain implementation; the largest budget counts. Its largest error is a random
            number that differs between processors, so one draw is passed here and missed there. A gradient with a
            handful of entries (a decay's) needs more: one error in three passes twice another.
        gradients: False for an op that has none.

    Returns:
        Relative error of every value and gradient against float64.

    Raises:
        AssertionError: as `assert_within_budget`.
    """
    low_dtype = next(iter(inputs.values())).dtype
    wide_inputs = {name: tensor.double() for name, tensor in inputs.items()}
    actual = values_and_gradients(op, inputs, seed=seed, rounded_to=low_dtype, gradients=gradients)
    plainly = []
    for n in range(draws):
        each = (
            values_and_gradients(plain, x, seed=seed + 100 * n, rounded_to=low_dtype, gradients=gradients)
            for x in (inputs, wide_inputs)
        )
        plainly.append((*each,))
    low, high = plainly[0]
    if actual.keys() != high.keys():
        raise AssertionError(f"the op gave {sorted(actual)}, the plain implementation {sorted(high)}")
    for name in high:
        budget = max(error_budget(one[name], other[name], actual[name].dtype) for one, other in plainly)
        assert_within_budget(actual[name], low[name], high[name], name, budget=budget)
    return {name: relative_error(actual[name], high[name]) for name in high}


def _max_error(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
