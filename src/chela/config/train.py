"""How a run trains: the optimiser and the loop."""

import math
from dataclasses import dataclass
from typing import Literal

from chela.config.checks import check_fields, require
from chela.duration import seconds


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its parameter groups and its schedule."""

    lr: float = 1e-3
    """Peak learning rate."""
    kernel_lr: float = 0.0
    """Peak learning rate of convolution kernels; 0 takes lr."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; none on kernels, norms, biases, gains and embeddings."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's averaging rates."""
    eps: float = 1e-8
    """AdamW's denominator floor."""
    clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    warmup: int = 100
    """Steps of linear warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """What follows the warm-up, down to zero at the last step (or constant)."""

    def __post_init__(self) -> None:
        check_fields(self, "optim")
        for name in ("lr", "eps"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"optim.{name} must be positive and finite, got {value}")
        for name in ("kernel_lr", "weight_decay", "clip", "warmup"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"optim.{name} must be finite and not negative, got {value}")
        require(all(0 <= b < 1 for b in self.betas), f"optim.betas must lie in [0, 1), got {self.betas}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop: how long, how often, on what."""

    steps: int = 1000
    """Optimiser steps."""
    minutes: float = 0.0
    """Train for so many minutes instead, and let the schedule end with them whatever a step takes; 0 counts steps.
    Validation, checkpoints and the first step of each start, which compiles, are left out of the count."""
    start_from: str = ""
    """Folder of a run whose best weights this one starts from; empty draws them."""
    batch_size: int = 64
    """Examples an optimiser step, over all processes and accumulation."""
    bucket_batches: int = 0
    """Batches whose sequences are sorted by length together, so that a batch holds like lengths; 0 sorts nothing."""
    pad_multiple: int = 1
    """Sequences are padded to a multiple of this many steps: fewer different lengths to compile and record for."""
    label_smoothing: float = 0.0
    """Share of each label that training spreads evenly over all classes (classifiers); results never do."""
    ema_decay: float = 0.0
    """Share kept each step of averaged weights (0.999: of about a thousand steps), which are validated, tested and kept
    in place of those that are trained; 0 averages nothing."""
    length_warmup: int = 0
    """Steps over which the windows of a language model double from first_length to their full length, in equal stages;
    the tokens a step stay the same. 0 starts with full windows."""
    first_length: int = 256
    """Length of the first windows of a length warm-up, or a little more, as halving the full length allows."""
    carry_state: bool = False
    """Each row of the batch reads on where it stopped, with the state of the step before (a language model's, cut from
    its gradient: truncated backpropagation through time)."""
    accumulate: int = 1
    """Slices a process cuts its share of the batch into, to save memory."""
    checkpoint_blocks: bool = False
    """Keep only the input of each block for the backward pass and compute the block again, to save memory."""
    eval_every: int = 100
    """Steps between validations; the best one's weights are kept."""
    eval_batch_size: int = 0
    """Examples a validation batch; 0 takes batch_size."""
    eval_examples: int = 0
    """Validation examples looked at; 0 takes all."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Also write the journal's numbers for TensorBoard, in the run's folder tensorboard (needs chela[track])."""
    time_limit: str = ""
    """Save and stop after this long, e.g. 9m, 90s, 1h30m; the same command goes on."""
    chance_after: int = 1000
    """Warn when the training loss is still at chance after this many steps; 0 never warns."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type under autocast (parameters stay float32); auto is bfloat16 on a GPU, float32 on a CPU."""
    compile: bool = True
    """On a GPU, compile the blocks and (one process, no accumulation) replay each step as a CUDA graph."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms everywhere."""

    def __post_init__(self) -> None:
        check_fields(self, "train")
        counts = "steps batch_size pad_multiple first_length accumulate eval_every save_every keep log_every"
        for name in counts.split():
            require(getattr(self, name) >= 1, f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("bucket_batches", "length_warmup", "eval_batch_size", "eval_examples", "chance_after"):
            require(getattr(self, name) >= 0, f"train.{name} must not be negative, got {getattr(self, name)}")
        require(0 <= self.label_smoothing < 1, f"train.label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        require(0 <= self.ema_decay < 1, f"train.ema_decay must lie in [0, 1), got {self.ema_decay}")
        require(0 <= self.minutes < math.inf, f"train.minutes must be finite and not negative, got {self.minutes}")
        require(
            not (self.length_warmup and self.carry_state),
            "train.length_warmup cuts rows in pieces, train.carry_state reads on in each row: take one of them",
        )
        require(
            self.pad_multiple == 1 or not self.carry_state,
            f"train.pad_multiple is {self.pad_multiple}: train.carry_state takes no padding, set it to 1",
        )
        seconds(self.time_limit)
