"""Which data a run reads, and how."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chela.config.checks import check_fields, require

Encoding = Literal["", "bytes", "bpe", "characters", "real", "tokens"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which task, where its files lie, and how it is read."""

    task: str = "digits"
    """Task name: `chela data` lists them."""
    root: Path = Path("~/.cache/chela")
    """Folder of downloaded and generated data."""
    encoding: Encoding = ""
    """What a step is: byte or character of a text or a token of a byte-level BPE trained on it, pixel as real value or
    as token; empty takes the task's usual."""
    vocab: int = 0
    """Symbols of the tokenizer that is trained, with encoding bpe; 0 takes 16,384."""
    packed: bool = False
    """Rows hold whole documents, each alone, instead of windows of one stream (language models); one longer than
    max-length is cut into pieces."""
    rate: int = 0
    """Samples a second of recordings, 16000 or every second one, 8000; 0 takes the rate of the files."""
    max_length: int = 0
    """Cut sequences to this many tokens; 0 takes the task's own length."""
    min_length: int = 0
    """Shortest tree, where the task is generated (ListOps); 0 takes the task's own."""
    examples: int = 0
    """Training examples to generate, where the task is generated; 0 takes the task's own number."""
    distractors: int = 0
    """Short paths that distract in a generated image (Pathfinder, Path-X); 0 takes the task's own number."""
    seed: int = 0
    """Seed of generated data and of splits that are not published; the seed of a run does not change them."""

    def __post_init__(self) -> None:
        check_fields(self, "data")
        for name in ("vocab", "rate", "max_length", "min_length", "examples", "distractors", "seed"):
            require(getattr(self, name) >= 0, f"data.{name} must not be negative, got {getattr(self, name)}")
        require(
            not 0 < self.vocab <= 256,
            f"data.vocab is {self.vocab}, but all bytes and the end of a document take 257 symbols",
        )
