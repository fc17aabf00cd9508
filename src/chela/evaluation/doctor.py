"""`chela doctor`: what chela finds on this machine and what it would do with it."""

import functools
import importlib.metadata
import platform
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

import chela
from chela.evaluation.datasets import inventory
from chela.evaluation.selftest import known_issues, selftest
from chela.evaluation.terminal import console_for_tables
from chela.ops.impl import WITH_TRITON, resolve

OPTIONAL = {
    "matplotlib": "curves in reports: install chela[plot]",
    "pillow": "the published images of Pathfinder: install chela[data]",
    "pyarrow": "data sets in Parquet files: install chela[data]",
    "tensorboard": "TensorBoard logs: install chela[track]",
    "tokenizers": "language models on tokens: install chela[data]",
    "transformers": "models for Hugging Face: install chela[hf]",
}


def diagnose(root: Path) -> list[tuple[str, str, str]]:
    """Findings as rows (part, name, text): versions, devices, implementations, known issues, packages and data."""
    rows = [
        ("versions", "chela", chela.__version__),
        ("versions", "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("versions", "torch", torch.__version__),
        ("versions", "triton", version("triton") or "not installed: the kernels for GPUs need it"),
        ("devices", "cpu", f"{torch.get_num_threads()} threads"),
        *_gpus(),
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows += [("implementations", op, _choice(op, device)) for op in sorted(WITH_TRITON)]
    rows += [("GPUs and Triton", pair, text) for pair, text in _issues()]
    rows += [("optional packages", name, version(name) or f"not installed ({use})") for name, use in OPTIONAL.items()]
    return rows + [("data", name, text) for name, text in inventory(root)]


def show(root: Path) -> None:
    """Print the findings as a table."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")  # a long name is cut nowhere
    part = ""
    for group, name, text in diagnose(root):
        if part and group != part:
            table.add_section()
        table.add_row(Text(group if group != part else "", style="bold"), Text(name), Text(text))
        part = group
    console_for_tables().print(table)


def examine() -> int:
    """Run the self-test on the GPU, or on the CPU where there is none; the number of cases that failed."""
    print(flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return selftest(device, write=functools.partial(print, flush=True))


def version(package: str) -> str:
    """Version of an installed package, or an empty string."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpus() -> list[tuple[str, str, str]]:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = (
            f"torch is built for CUDA {built} but sees no GPU" if built else "this build of torch is for the CPU alone"
        )
        return [("devices", "gpu", f"none: {why}")]
    rows = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        text = f"{facts.name}, compute capability {facts.major}.{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"
        rows.append(("devices", f"cuda:{index}", text))
    return rows


def _issues() -> list[tuple[str, str]]:
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return known_issues(capability, version("triton"))


def _choice(op: str, device: torch.device) -> str:
    try:
        chosen = resolve("auto", device, op)
    except ValueError as error:
        return f"cannot run: {error}"
    return f"{chosen} (on {'a GPU' if device.type == 'cuda' else 'a CPU'})"
