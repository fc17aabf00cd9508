"""What a run is made of: frozen dataclasses and every check on them (`chela.record` takes them to TOML and back).

A field's docstring is its help on the command line. `dataclasses.replace` is the only way to change a value;
each replacement is checked again. Sizes are plain counts: tokens, channels, examples, steps.
"""

from chela.config.data import DataConfig, Encoding
from chela.config.model import ModelConfig
from chela.config.run import RunConfig
from chela.config.train import OptimConfig, TrainConfig

__all__ = ["DataConfig", "Encoding", "ModelConfig", "OptimConfig", "RunConfig", "TrainConfig"]
