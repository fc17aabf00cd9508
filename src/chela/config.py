"""What a run is made of: frozen dataclasses and every check on them (`record` takes them to TOML and back).

A field's docstring is its help on the command line. `dataclasses.replace` is the only way to change a value;
each replacement is checked again. Sizes are plain counts: tokens, channels, examples, steps.
"""

import math
from dataclasses import dataclass, field, fields
from numbers import Integral
from pathlib import Path
from typing import Literal, get_args, get_origin

from chela.duration import seconds

Encoding = Literal["", "bytes", "bpe", "characters", "real", "tokens"]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _check_fields(config: "ModelConfig | DataConfig | OptimConfig | TrainConfig", part: str) -> None:
    """Refuse what a type checker would: no whole number, or none of the choices."""
    for f in fields(config):
        value, choices = getattr(config, f.name), get_args(f.type)
        if get_origin(f.type) is Literal:
            _require(value in choices, f"{part}.{f.name} must be one of {', '.join(choices)}; got {value!r}")
        _require(f.type is not int or isinstance(value, Integral), f"{part}.{f.name} must be int, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model; everything its weights depend on and nothing else."""

    kind: Literal["classifier", "two-tower", "causal-lm"] = "classifier"
    """What the model answers: a class, a class of a pair, or the next token."""
    inputs: Literal["tokens", "real"] = "tokens"
    """Integer symbols, or real values (pixels, samples)."""
    vocab: int = 256
    """Number of symbols, when inputs are tokens; id 0 is padding unless the task says otherwise."""
    channels: int = 1
    """Real values per time step, when inputs are real."""
    classes: int = 10
    """Number of classes (classifier, two-tower)."""
    layers: int = 6
    """Number of blocks."""
    mixer: Literal["chela", "transformer", "gla"] = "chela"
    """CHELA's blocks, or a baseline's (language models alone): softmax attention with rotary positions, or gated linear
    attention of flash-linear-attention, each with SwiGLU; they read layers, d-model, d-ff, heads, norm and dropout."""
    d_model: int = 128
    """Width D of the residual stream."""
    d_ff: int = 256
    """Width of the feed-forward part; 0 leaves it out."""
    feed_forward: Literal["mlp", "swiglu", "bounded-swiglu"] = "mlp"
    """Feed-forward part of CHELA's blocks: two matrices around a SiLU, or three with a gate (the baselines have it),
    the second factor as it is or bounded by tanh (beside batch norm)."""
    d_key: int = 64
    """Width K of queries and keys, per head."""
    d_value: int = 256
    """Width of the values, over all heads."""
    heads: int = 1
    """Attention heads H; d_value must be a multiple of it."""
    causal: bool = False
    """Each position sees the past alone (always so in a language model)."""
    short_width: int = 4
    """Taps W of the short convolution; 0 leaves the stage out."""
    kernel_length: int = 2048
    """Taps L of the long convolution, which is also the longest sequence a classifier takes; 0 leaves the stage out."""
    kernel: Literal["dense", "multiscale"] = "dense"
    """Parameters of the long kernel: one a tap, or equally many an octave of lags."""
    taps_per_octave: int = 16
    """Parameters an octave of lags and channel, in the multiscale kernel."""
    branches: tuple[int, ...] = (7, 31)
    """Widths of the short branches that train beside the long kernel and fold into it."""
    branch_norm: bool = False
    """Batch norm on each branch (folded on merge); needs one convolution a branch while training."""
    squash: float = 0.0
    """Soft threshold on the taps of the long kernel."""
    tap_dropout: float = 0.0
    """Share of the long kernel's taps dropped in training."""
    attention: bool = True
    """Linear attention and its gate; False leaves the convolutions and the output gate."""
    attention_norm: Literal["rms", "sum", "none"] = "rms"
    """Normalisation of the attention output: RMS per head, the sum of weights (positive features), none."""
    decay: bool = False
    """A learned decay per head in the attention (causal only)."""
    norm: Literal["layer", "rms", "scale", "batch"] = "layer"
    """Norm around each half of a block."""
    prenorm: bool = True
    """Norm before each half (and once at the end) instead of after it."""
    dropout: float = 0.0
    """Dropout in the gates and the feed-forward part."""
    token_dropout: float = 0.0
    """Share of input steps whose embedding is zero in training (word dropout)."""
    pooling: Literal["mean", "first", "last", "query"] = "mean"
    """How a classifier sums up a sequence; padding never counts."""
    merged: bool = False
    """The long convolution's branches are folded into one kernel: for inference, no longer trainable as branches."""

    def __post_init__(self) -> None:
        _check_fields(self, "model")
        for name in ("vocab", "channels", "layers", "d_model", "d_key", "d_value", "heads", "taps_per_octave"):
            _require(getattr(self, name) >= 1, f"model.{name} must be at least 1, got {getattr(self, name)}")
        _require(self.classes >= 2, f"model.classes must be at least 2, got {self.classes}")
        for name in ("d_ff", "short_width", "kernel_length", "squash"):
            _require(getattr(self, name) >= 0, f"model.{name} must not be negative, got {getattr(self, name)}")
        for name in ("tap_dropout", "dropout", "token_dropout"):
            _require(0 <= getattr(self, name) < 1, f"model.{name} must lie in [0, 1), got {getattr(self, name)}")
        _require(
            self.d_value % self.heads == 0,
            f"model.d_value {self.d_value} is not a multiple of model.heads {self.heads}",
        )
        _require(all(w >= 1 for w in self.branches), f"model.branches must be positive widths, got {self.branches}")
        _require(self.kind != "causal-lm" or self.causal, "a language model is causal: set model.causal true")
        _require(
            self.kind != "causal-lm" or self.norm != "batch",
            "batch norm looks across positions: for a language model take model.norm layer, rms or scale",
        )
        if self.mixer != "chela":
            _require(self.kind == "causal-lm", f"model.mixer {self.mixer} is for model.kind causal-lm alone")
            _require(self.prenorm, f"model.mixer {self.mixer} has its norms in front: set model.prenorm true")
            _require(
                self.d_model % (2 * self.heads) == 0,
                f"model.d_model {self.d_model} must be a multiple of twice model.heads {self.heads}",
            )
        _require(self.causal or not self.decay, "model.decay needs model.causal true")
        _require(
            self.attention or self.kernel_length > 0 or self.short_width > 0,
            "nothing mixes the sequence: switch on model.attention, model.kernel_length or model.short_width",
        )


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
        _check_fields(self, "data")
        for name in ("vocab", "rate", "max_length", "min_length", "examples", "distractors", "seed"):
            _require(getattr(self, name) >= 0, f"data.{name} must not be negative, got {getattr(self, name)}")
        _require(
            not 0 < self.vocab <= 256,
            f"data.vocab is {self.vocab}, but all bytes and the end of a document take 257 symbols",
        )


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
        _check_fields(self, "optim")
        for name in ("lr", "eps"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"optim.{name} must be positive and finite, got {value}")
        for name in ("kernel_lr", "weight_decay", "clip", "warmup"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"optim.{name} must be finite and not negative, got {value}")
        _require(all(0 <= b < 1 for b in self.betas), f"optim.betas must lie in [0, 1), got {self.betas}")


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
    """Share kept each step of averaged weights (0.999 averages over about 1,000 steps), which are validated, tested and
    kept in place of those that are trained; 0 averages nothing."""
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
        _check_fields(self, "train")
        counts = "steps batch_size pad_multiple first_length accumulate eval_every save_every keep log_every"
        for name in counts.split():
            _require(getattr(self, name) >= 1, f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("bucket_batches", "length_warmup", "eval_batch_size", "eval_examples", "chance_after"):
            _require(getattr(self, name) >= 0, f"train.{name} must not be negative, got {getattr(self, name)}")
        _require(0 <= self.label_smoothing < 1, f"train.label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        _require(0 <= self.ema_decay < 1, f"train.ema_decay must lie in [0, 1), got {self.ema_decay}")
        _require(0 <= self.minutes < math.inf, f"train.minutes must be finite and not negative, got {self.minutes}")
        _require(
            not (self.length_warmup and self.carry_state),
            "train.length_warmup cuts rows in pieces, train.carry_state reads on in each row: take one of them",
        )
        _require(
            self.pad_multiple == 1 or not self.carry_state,
            f"train.pad_multiple is {self.pad_multiple}: train.carry_state takes no padding, set it to 1",
        )
        seconds(self.time_limit)


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
        _require(0 <= self.seed < 1 << 63, f"seed must lie between 0 and 2^63 - 1, got {self.seed}")
        for name, path in (("out", self.out), ("data.root", self.data.root)):
            plain = str(path).encode(errors="replace").decode() == str(path)
            _require(
                plain, f"{name} {str(path)!r} is not UTF-8, and config.toml could not name it: take another folder"
            )
        _require(
            not (self.train.label_smoothing and self.model.kind == "causal-lm"),
            "train.label_smoothing is for classifiers: a language model's loss is that of its symbols, set it to 0",
        )
        _require(
            not (self.data.packed and self.train.length_warmup),
            "train.length_warmup cuts windows, and data.packed has none: take one of them",
        )

    @property
    def folder(self) -> Path:
        """Where the run lives: `out`, or runs/PRESET-seedN."""
        return self.out.expanduser() if self.out != Path("") else Path("runs") / f"{self.preset}-seed{self.seed}"
