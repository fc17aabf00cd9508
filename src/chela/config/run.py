"""A run: its parts, and what they must agree on."""

from dataclasses import dataclass, field
from pathlib import Path

from chela.config.checks import require
from chela.config.data import DataConfig
from chela.config.model import ModelConfig
from chela.config.train import OptimConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: a preset's name, a seed, and the four parts."""

    preset: str = "custom"
    """Name of the preset this run was derived from."""
    seed: int = 0
    """Seed of initial weights, of the order of examples and of dropout."""
    out: Path = Path("")
    """Folder of the run; empty means runs/PRESET-seedN."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 1 << 63, f"seed must lie between 0 and 2^63 - 1, got {self.seed}")
        for name, path in (("out", self.out), ("data.root", self.data.root)):
            plain = str(path).encode(errors="replace").decode() == str(path)
            require(plain, f"{name} {str(path)!r} is not UTF-8, and config.toml could not name it: take another folder")
        require(
            not (self.train.label_smoothing and self.model.kind == "causal-lm"),
            "train.label_smoothing is for classifiers: a language model's loss is that of its symbols, set it to 0",
        )
        require(
            not (self.data.packed and self.train.length_warmup),
            "train.length_warmup cuts windows, and data.packed has none: take one of them",
        )

    @property
    def folder(self) -> Path:
        """Where the run lives: `out`, or runs/PRESET-seedN."""
        return self.out.expanduser() if self.out != Path("") else Path("runs") / f"{self.preset}-seed{self.seed}"
