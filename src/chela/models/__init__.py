"""Models built from a `ModelConfig`."""

from chela.models.build import build as build
from chela.models.causal_lm import CausalLM as CausalLM
from chela.models.classifier import Classifier as Classifier
from chela.models.classifier import TwoTowerClassifier as TwoTowerClassifier
from chela.models.files import load_model as load_model
from chela.models.files import save_model as save_model
from chela.models.state import ChelaState as ChelaState
