"""CHELA in Hugging Face transformers: config, models, cache and tokenizers, without remote code.

The only place that imports transformers (`pip install 'chela[hf]'`). After one call of `register()` the Auto classes
know the models. A checkpoint holds the weights of `chela.models` under one prefix, `chela.`, by the same names.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from chela.models.hf.base import ChelaModel as ChelaModel
from chela.models.hf.cache import ChelaCache as ChelaCache
from chela.models.hf.causal_lm import ChelaForCausalLM as ChelaForCausalLM
from chela.models.hf.classifier import ChelaForSequenceClassification as ChelaForSequenceClassification
from chela.models.hf.config import ChelaConfig as ChelaConfig
from chela.models.hf.tokenizer import byte_tokenizer as byte_tokenizer
from chela.models.hf.tokenizer import run_tokenizer as run_tokenizer


def register() -> None:
    """Make the Auto classes know CHELA: `AutoConfig`, `AutoModel`, `...ForCausalLM`, `...ForSequenceClassification`."""
    AutoConfig.register(ChelaConfig.model_type, ChelaConfig, exist_ok=True)
    AutoModel.register(ChelaConfig, ChelaModel, exist_ok=True)
    AutoModelForCausalLM.register(ChelaConfig, ChelaForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(ChelaConfig, ChelaForSequenceClassification, exist_ok=True)
