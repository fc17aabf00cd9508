"""The settings of a model as transformers keeps them: `ModelConfig` beside what every config there has."""

import difflib
from typing import Any, ClassVar, Literal

from transformers import PreTrainedConfig

from chela.config import ModelConfig
from chela.record import from_dict, to_dict

Kind = Literal["classifier", "causal-lm"]

_DEFAULTS = {name: value for name, value in to_dict(ModelConfig()).items() if name not in ("kind", "classes")}
"""Settings that ChelaConfig takes over: the class of the model says its kind, `num_labels` the number of classes."""


class ChelaConfig(PreTrainedConfig):
    """The settings of `ModelConfig` by their own names, beside those that every config of transformers has.

    Args:
        settings: fields of `ModelConfig` (but `kind`, which the class of the model decides, and `classes`, which is
            `num_labels`), with the same defaults; those of `PreTrainedConfig`. `vocab_size`, `hidden_size`,
            `intermediate_size`, `num_hidden_layers` and `num_attention_heads` are other names of `vocab`, `d_model`,
            `d_ff`, `layers` and `heads`.

    Raises:
        ValueError: a setting of the wrong type or out of range, or a name close to one of ours that is none.
    """

    model_type = "chela"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "vocab_size": "vocab",
        "hidden_size": "d_model",
        "intermediate_size": "d_ff",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
    }

    def __init__(self, **settings: Any) -> None:
        settings = {self.attribute_map.get(name, name): value for name, value in settings.items()}
        ours = {name: settings.pop(name, value) for name, value in _DEFAULTS.items()}
        for name in settings:
            close = difflib.get_close_matches(name, _DEFAULTS, n=1, cutoff=0.8)
            if close and not hasattr(PreTrainedConfig, name):
                raise ValueError(f"unknown key {name} (did you mean {close[0]!r}?)")
        self.use_cache: bool = settings.pop("use_cache", True)
        self.tie_word_embeddings: bool = settings.pop("tie_word_embeddings", False)
        super().__init__(**settings)
        for name, value in ours.items():
            setattr(self, name, value)
        if self.tie_word_embeddings:
            raise ValueError("chela's language model has a head of its own: tie_word_embeddings must be false")
        self.settings(self.body)

    @property
    def body(self) -> Kind:
        """A kind of model that has the stack of these settings: the baselines are language models alone."""
        return "classifier" if self.mixer == "chela" else "causal-lm"

    def settings(self, kind: Kind) -> ModelConfig:
        """The settings of a model of this kind.

        Raises:
            ValueError: a setting of the wrong type or out of range.
        """
        values = {name: getattr(self, name) for name in _DEFAULTS} | {"kind": kind}
        if kind == "classifier" and self.num_labels is not None:
            values["classes"] = self.num_labels
        return from_dict(ModelConfig, values, "model.")

    @classmethod
    def of(cls, config: ModelConfig) -> "ChelaConfig":
        """The config of a chela model."""
        values = {name: value for name, value in to_dict(config).items() if name in _DEFAULTS}
        return cls(**values, num_labels=config.classes) if config.kind == "classifier" else cls(**values)
