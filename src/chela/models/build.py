"""From a `ModelConfig` to a model."""

from chela.config import ModelConfig
from chela.models.causal_lm import CausalLM
from chela.models.classifier import Classifier, TwoTowerClassifier


def build(config: ModelConfig) -> Classifier | TwoTowerClassifier | CausalLM:
    """Make the model a config describes, its parameters drawn from torch's global generator."""
    kinds = {"classifier": Classifier, "two-tower": TwoTowerClassifier, "causal-lm": CausalLM}
    model = kinds[config.kind](config)
    if config.merged:
        model.merge()
    return model
