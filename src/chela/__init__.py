"""CHELA: short-long convolutions with hardware-efficient linear attention, for long sequences."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from chela.config import ModelConfig, RunConfig
    from chela.models import CausalLM, ChelaState, Classifier, TwoTowerClassifier, build
    from chela.presets import preset

# Where each public name lives: modules are imported when a name is first asked for, so that `chela --help` and
# `import chela` wait for nothing.
_HOMES = {
    "CausalLM": "chela.models",
    "ChelaState": "chela.models",
    "Classifier": "chela.models",
    "ModelConfig": "chela.config",
    "RunConfig": "chela.config",
    "TwoTowerClassifier": "chela.models",
    "build": "chela.models",
    "preset": "chela.presets",
}

__all__ = [
    "CausalLM",
    "ChelaState",
    "Classifier",
    "ModelConfig",
    "RunConfig",
    "TwoTowerClassifier",
    "__version__",
    "build",
    "preset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'chela' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
