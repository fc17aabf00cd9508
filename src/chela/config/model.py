"""The shape of a model."""

from dataclasses import dataclass
from typing import Literal

from chela.config.checks import check_fields, require


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
        check_fields(self, "model")
        for name in ("vocab", "channels", "layers", "d_model", "d_key", "d_value", "heads", "taps_per_octave"):
            require(getattr(self, name) >= 1, f"model.{name} must be at least 1, got {getattr(self, name)}")
        require(self.classes >= 2, f"model.classes must be at least 2, got {self.classes}")
        for name in ("d_ff", "short_width", "kernel_length", "squash"):
            require(getattr(self, name) >= 0, f"model.{name} must not be negative, got {getattr(self, name)}")
        for name in ("tap_dropout", "dropout", "token_dropout"):
            require(0 <= getattr(self, name) < 1, f"model.{name} must lie in [0, 1), got {getattr(self, name)}")
        require(
            self.d_value % self.heads == 0,
            f"model.d_value {self.d_value} is not a multiple of model.heads {self.heads}",
        )
        require(all(w >= 1 for w in self.branches), f"model.branches must be positive widths, got {self.branches}")
        require(self.kind != "causal-lm" or self.causal, "a language model is causal: set model.causal true")
        require(
            self.kind != "causal-lm" or self.norm != "batch",
            "batch norm looks across positions: for a language model take model.norm layer, rms or scale",
        )
        if self.mixer != "chela":
            require(self.kind == "causal-lm", f"model.mixer {self.mixer} is for model.kind causal-lm alone")
            require(self.prenorm, f"model.mixer {self.mixer} has its norms in front: set model.prenorm true")
            require(
                self.d_model % (2 * self.heads) == 0,
                f"model.d_model {self.d_model} must be a multiple of twice model.heads {self.heads}",
            )
        require(self.causal or not self.decay, "model.decay needs model.causal true")
        require(
            self.attention or self.kernel_length > 0 or self.short_width > 0,
            "nothing mixes the sequence: switch on model.attention, model.kernel_length or model.short_width",
        )
