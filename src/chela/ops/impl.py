"""Which implementation of an op runs: chosen by the device alone, or named by the caller. Nothing is ever swapped."""

import os
from importlib.util import find_spec
from typing import Literal, get_args

import torch

Impl = Literal["auto", "triton", "reference"]

WITH_TRITON = frozenset({"batch_norm", "feed_forward", "gated_output", "linear_attention", "long_conv", "short_conv"})
"""Ops that have Triton kernels. "auto" runs the reference of every other op, on every device."""


def resolve(impl: Impl, device: torch.device, op: str) -> Literal["triton", "reference"]:
    """Name the implementation of `op` to run on `device`.

    Args:
        impl: "auto" takes Triton on CUDA where the op has it and the reference elsewhere; the others are taken at
            their word.
        device: where the tensors are.
        op: name of the op, as in `WITH_TRITON`.

    Returns:
        "triton" or "reference".

    Raises:
        ValueError: the request is unknown or cannot run here.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}; got {impl!r}")
    if impl == "reference" or (impl == "auto" and (op not in WITH_TRITON or device.type != "cuda")):
        return "reference"
    if op not in WITH_TRITON:
        raise ValueError(f"{op} has no Triton implementation: use impl='auto' or impl='reference'")
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            f"impl='triton' needs tensors on a CUDA device, got {device}: move them there, use impl='reference', "
            "or on the CPU set TRITON_INTERPRET=1 before starting Python to run the kernels in Triton's interpreter"
        )
    if not torch.compiler.is_compiling() and find_spec("triton") is None:
        raise ValueError("the package triton is not installed: install it, or use impl='reference'")
    return "triton"
