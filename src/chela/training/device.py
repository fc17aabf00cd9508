"""Where and in which type to compute."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from chela.ops.deterministic import deterministic


def pick_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this process.

    Raises:
        ValueError: cuda where there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device is cuda, but torch sees no CUDA GPU here: set --train.device cpu or auto")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def compute_type(dtype: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """The type of the forward pass; auto is bfloat16 on a GPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory that tensors of this process have taken on its GPU at once, as `peak_gib`; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {"peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 3)}


def deterministic_if(asked: bool) -> AbstractContextManager[None]:
    """Deterministic algorithms of torch for a while, if they are asked for."""
    if not asked:
        return nullcontext()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    return deterministic()
