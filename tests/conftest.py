import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it

import random
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it once
    if find_spec("triton"):
        import interpreter_kit  # pyrefly: ignore

        interpreter_kit.hasten()

torch.set_num_threads(1)
settings.register_profile("chela", derandomize=True, deadline=None, max_examples=15)
settings.load_profile("chela")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_runtest_setup():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (for code that draws from the global generator)
    random.seed(0)
    if compiler := sys.modules.get("torch._dynamo"):
        compiler.reset()  # what earlier tests compiled counts against the limit of recompilations


@pytest.fixture
def nan_memory():
    """Memory torch hands out unwritten holds NaN (or the largest integer): a kernel that reads it is caught."""
    before = torch.are_deterministic_algorithms_enabled()
    # A warning is an error in these tests, but for that of cumsum: the reference's has no such form on a GPU.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
