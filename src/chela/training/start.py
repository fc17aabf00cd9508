"""Weights of another run, to start from instead of drawn ones."""

from pathlib import Path

import torch
from torch import Tensor

from chela.config import RunConfig
from chela.models import build
from chela.models.files import load_model
from chela.training.folder import check_tokenizer


def starting_weights(run: RunConfig, tokens: str) -> dict[str, Tensor]:
    """Best weights of the run in `run.train.start_from`, to be this run's before its first step.

    What has no weights may differ between the two runs: dropout, rates, the data, the length of sequences where no
    weight depends on it.

    Args:
        run: every setting.
        tokens: content of the tokenizer.json of the data; empty for data without one.

    Raises:
        ValueError: not the folder of a run with weights, damaged, of other names or shapes, or trained on other tokens.
    """
    folder = Path(run.train.start_from).expanduser()
    path = folder / "model.safetensors"
    found = load_model(path).state_dict()
    with torch.device("meta"):
        wanted = build(run.model).state_dict()
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        theirs, ours = (tuple(x[name].shape) if name in x else "missing" for x in (found, wanted))
        if theirs != ours:
            raise ValueError(
                f"train.start_from: {name} is {theirs} in {path} and {ours} in this model: give it the widths, layers "
                f"and classes of the model in {folder / 'config.toml'}"
            )
    check_tokenizer(folder, tokens)
    return found
