"""What the models share, and the one without a head."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput

from chela.config import RunConfig
from chela.models.backbone import Backbone, merge
from chela.models.build import build
from chela.models.files import load_model, save_model
from chela.models.hf.config import ChelaConfig, Kind
from chela.models.hf.tokenizer import TOKENIZER
from chela.ops.impl import Impl
from chela.record import load_toml, save_toml


class ChelaPreTrainedModel(PreTrainedModel):
    """What the models share."""

    config_class = ChelaConfig
    config: ChelaConfig  # pyrefly: ignore
    base_model_prefix = "chela"
    _is_stateful = True  # methods of generation that take tokens back are refused
    _keep_in_fp32_modules_strict = ["kernel", "decay_logit"]  # noqa: RUF012 (what long sums and powers are made of)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChelaBlock"]  # noqa: RUF012 (as transformers declares it)

    def init_weights(self) -> None:
        """Leave the weights as they are: the layers' constructors have drawn them."""

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw what a checkpoint did not hold, as the layers' constructors do."""
        here = dict([*self.named_parameters(), *self.named_buffers()])
        missing = [name for name, value in here.items() if not getattr(value, "_is_hf_initialized", False)]
        if missing:
            fresh = type(self)(self.config)
            for name in missing:
                here[name].copy_(fresh.get_parameter_or_buffer(name))

    def _backbone(self) -> Backbone:
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        if self.config.inputs != "tokens":
            raise NotImplementedError("this model reads real values: it has no embedding of tokens")
        return self._backbone().embedding.tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of tokens."""
        assert isinstance(value, nn.Embedding)
        backbone = self._backbone()
        backbone.embedding.tokens, backbone.embedding.vocab = value, value.num_embeddings
        backbone.config = replace(backbone.config, vocab=value.num_embeddings)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether training keeps each block's input alone and computes the block again for its gradient."""
        return self._backbone().checkpoint_blocks

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keep each block's input alone while training; no options.

        Raises:
            ValueError: an option other than transformers' defaults.
        """
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant") or every_n_layers != 1 or offload:
            raise ValueError("gradient checkpointing keeps the input of every block, not reentrant: leave options out")
        self._backbone().checkpoint_blocks = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep everything."""
        self._backbone().checkpoint_blocks = False


class ChelaModel(ChelaPreTrainedModel):
    """The stack without a head: vectors [B, T, D]."""

    def __init__(self, config: ChelaConfig) -> None:
        super().__init__(config)
        with real_device():
            self.backbone = Backbone(config.settings(config.body))
            if config.merged:
                merge(self.backbone)
        self.post_init()

    def _backbone(self) -> Backbone:
        return self.backbone

    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Tensor | None = None,
        input_values: Float[Tensor, "b t c"] | None = None,
        return_dict: bool | None = None,
        impl: Impl = "auto",
    ) -> BaseModelOutput | tuple[Tensor, ...]:
        """Vectors [B, T, D]; arguments as `ChelaForSequenceClassification`'s.

        Raises:
            ValueError: wrong inputs.
        """
        inputs = pick_inputs(self.config, input_ids, input_values)
        x, _ = self.backbone(inputs, mask=as_mask(attention_mask, inputs), impl=impl)
        return answer(self, BaseModelOutput(last_hidden_state=x), return_dict)


class RunModel(ChelaPreTrainedModel):
    """A model of `chela.models` inside one of transformers."""

    kind: ClassVar[Kind]
    chela: Any

    def __init__(self, config: ChelaConfig) -> None:
        super().__init__(config)
        with real_device():
            self.chela = build(config.settings(self.kind))
        self.post_init()

    def _backbone(self) -> Backbone:
        return self.chela.backbone

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of tokens."""
        super().set_input_embeddings(value)
        self.chela.config = self.chela.backbone.config = replace(self.chela.config, vocab=self._backbone().config.vocab)

    def merge(self) -> None:
        """Fold the branches of every convolution in place: for inference, whose steps then hardly slow down."""
        self.chela.merge()
        self.config.merged = True

    @classmethod
    def from_run(cls, folder: str | Path) -> Self:
        """Read the best weights of a run of `chela train`, in evaluation mode.

        Raises:
            ValueError: not the folder of a run, its files are damaged, or its model is of another kind.
        """
        folder = Path(folder)
        settings = load_toml(folder / "config.toml").model
        if settings.kind != cls.kind:
            raise ValueError(f"{folder} holds a {settings.kind}, but {cls.__name__} is a {cls.kind}")
        model = cls(ChelaConfig.of(settings))
        model.chela = load_model(folder / "model.safetensors", settings)
        return model.eval()

    def save_run(
        self,
        folder: str | Path,
        run: RunConfig | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> None:
        """Write a folder that chela's commands read: `chela generate`, and `chela eval` where `run` says the task.

        Args:
            folder: to be made, or without a run in it.
            run: the settings of data and training to write down (the model's own replace its model); None writes
                chela's defaults.
            tokenizer: what makes the tokens of the model; None says that they are bytes, or nothing of that kind.

        Raises:
            ValueError: the folder holds a run already.
        """
        folder = Path(folder)
        if (folder / "config.toml").exists():
            raise ValueError(f"{folder} holds a run already: name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.chela, folder / "model.safetensors")
        if tokenizer is not None:
            (folder / TOKENIZER).write_text(tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
        save_toml(replace(run or RunConfig(), model=self.chela.config), folder / "config.toml")


def real_device() -> contextlib.AbstractContextManager[Any]:
    """Build on the CPU where transformers asks for tensors without numbers: kernels have fixed tables to compute."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else contextlib.nullcontext()


def pick_inputs(config: ChelaConfig, input_ids: Tensor | None, input_values: Tensor | None) -> Tensor:
    """What a model reads: tokens or real values.

    Raises:
        ValueError: the other one was passed, or both or none.
    """
    name, wanted, other = "input_ids", input_ids, input_values
    if config.inputs == "real":
        name, wanted, other = "input_values", input_values, input_ids
    if wanted is None or other is not None:
        raise ValueError(f"this model reads {config.inputs}: pass {name} alone")
    return wanted


def as_mask(attention_mask: Tensor | None, inputs: Tensor) -> Tensor | None:
    """The mask [B, T] of the inputs: with a cache the given one also covers what is past.

    Raises:
        ValueError: it is of another shape.
    """
    if attention_mask is None:
        return None
    batch, length = inputs.shape[:2]
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        raise ValueError(f"attention_mask must be [B, T] = {[batch, length]}; got {list(attention_mask.shape)}")
    return attention_mask[:, attention_mask.shape[1] - length :].bool()


def answer(model: PreTrainedModel, output: Any, return_dict: bool | None) -> Any:
    """An output as it was asked for: named, or a tuple of what is there."""
    whole = model.config.return_dict if return_dict is None else return_dict
    return output if whole else output.to_tuple()
