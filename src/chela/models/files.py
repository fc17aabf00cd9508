"""Weights on disk: safetensors with the model's settings and a checksum in the header, written whole or not at all."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from chela.config import ModelConfig
from chela.disk import write_whole
from chela.models.build import build
from chela.models.causal_lm import CausalLM
from chela.models.classifier import Classifier, TwoTowerClassifier
from chela.record import differences, from_dict, to_dict


def save_model(
    model: Classifier | TwoTowerClassifier | CausalLM, path: Path, *, matrices: torch.dtype | None = None
) -> None:
    """Write weights and settings to `path`; a crash leaves the old file or the new one.

    Args:
        model: what to write.
        path: where.
        matrices: dtype to round matrices and kernels to, for a smaller file; vectors and statistics stay as they are.
            None rounds nothing.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if matrices is not None:
        tensors = {name: value.to(matrices) if value.ndim > 1 else value for name, value in tensors.items()}
    header = json.dumps({"model": to_dict(model.config), "sha256": digest(tensors)}, sort_keys=True)
    # one entry: the library writes several in random order, and equal weights must give equal files
    write_whole(path, save(tensors, metadata={"chela": header}))


def load_model(
    path: Path, config: ModelConfig | None = None, device: torch.device | str = "cpu"
) -> Classifier | TwoTowerClassifier | CausalLM:
    """Read a model back, in evaluation mode.

    Args:
        path: a file of `save_model`.
        config: the settings expected; None takes those in the file.
        device: where to put it.

    Raises:
        ValueError: no such file, truncated, edited or not a model of ours, or saved with settings other than `config`.
    """
    metadata, tensors = read_weights(path)
    try:
        header = json.loads(metadata["chela"])
        saved, recorded = from_dict(ModelConfig, header["model"], "model."), header["sha256"]
    except (KeyError, TypeError):
        raise ValueError(f"{path} carries no model settings: it was not written by chela") from None
    except ValueError as error:
        raise ValueError(f"{path}: settings in the header: {error}") from None
    if config is not None and config != saved:
        changed = "; ".join(differences(saved, config, "model."))
        raise ValueError(f"{path} was saved with other settings than its config says: {changed}")
    if digest(tensors) != recorded:
        raise ValueError(f"the weights in {path} are not those that were saved: the file was edited or damaged")
    model = build(saved)
    expected = model.state_dict()
    wrong = [
        name
        for name in expected.keys() | tensors.keys()
        if name not in tensors or name not in expected or tensors[name].shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit its settings: {sorted(wrong)[0]} is missing, unknown or misshapen")
    model.load_state_dict(tensors)
    return model.to(device).eval()


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and numbers of tensors on the CPU, whatever their order."""
    total = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def read_weights(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a safetensors file.

    Raises:
        ValueError: missing, truncated or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:  # safetensors' word for a file that may not be read, too
        raise ValueError(f"{path} {'may not be read' if path.exists() else 'does not exist'}") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from None
