"""The journal's numbers in TensorBoard's format, for those who watch many runs side by side."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

SHOWN = ("train", "val", "test")
"""Kinds of lines that have curves."""


def check_board() -> None:
    """Refuse what is not installed.

    Raises:
        ValueError: says what to install.
    """
    if find_spec("tensorboard") is None:
        raise ValueError("train.tensorboard needs the package tensorboard: pip install 'chela[track]'")


class Board:
    """Writes a curve KIND/NAME for every number of a training, validation or test line.

    Args:
        folder: where the events go.
        step: steps done; what an earlier start wrote beyond them is hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, kind: str, values: dict[str, Any]) -> None:
        """Add the numbers of a line."""
        if kind not in SHOWN:
            return
        for name, value in values.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"{kind}/{name}", value, values["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the events."""
        self._writer.close()
