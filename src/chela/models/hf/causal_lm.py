"""The causal language model: labels, cache, `generate`."""

import inspect
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from chela.models.causal_lm import CausalLM
from chela.models.chunked_loss import IGNORED
from chela.models.hf.base import RunModel, answer, as_mask
from chela.models.hf.cache import ChelaCache
from chela.models.hf.config import Kind
from chela.models.hf.tokenizer import run_tokenizer
from chela.ops.impl import Impl


class ChelaForCausalLM(RunModel, GenerationMixin):
    """`CausalLM` with labels, `generate` and its cache."""

    kind: ClassVar[Kind] = "causal-lm"
    accepts_loss_kwargs = True
    chela: CausalLM

    @classmethod
    def from_run(cls, folder: str | Path) -> Self:
        """Read the best weights of a run of `chela train`, in evaluation mode.

        Where the run's tokenizer has a token for the end of a document, `generate` stops at it.

        Raises:
            ValueError: not the folder of a run, its files are damaged, or its model is of another kind.
        """
        model = super().from_run(folder)
        end = run_tokenizer(folder).eos_token_id
        if end is not None:
            assert model.generation_config is not None
            model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
        return model

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.chela.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        assert isinstance(new_embeddings, nn.Linear)
        self.chela.head = new_embeddings

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Tensor | None = None,
        past_key_values: ChelaCache | None = None,
        labels: Int[Tensor, "b t"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        return_dict: bool | None = None,
        impl: Impl = "auto",
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, vocab] of the token after each position; in training with labels, their loss alone.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], or with a cache [B, seen + T]: nonzero at real tokens; padding on either side, but
                none among tokens that follow on a cache.
            past_key_values: the cache of an earlier call, which is moved on in place.
            labels: int64 [B, T], the inputs themselves: they are shifted here; -100 is left out of the loss.
            use_cache: also return a cache; None does so without labels, outside of training.
            logits_to_keep: logits of so many last positions alone; 0 of all.
            cu_seqlens: int32 [N+1], document boundaries of a packed batch (B = 1); without a cache. The first label
                of every document must be -100.
            num_items_in_batch: labels over all slices of an optimiser step (`Trainer` passes it): the loss is their
                sum divided by it.
            skip_logits: compute the loss in slices of positions and leave `logits` None, so that neither logits nor
                their gradient are ever held whole (needs labels, no cache). None does so in training mode alone (the
                convention of Liger Kernel's models, Hsu et al. 2024), and not past a head or a loss function that is
                no longer the model's own; False keeps the logits.
            return_dict: False returns a tuple; None asks the config.
            impl: implementation of the ops.

        Raises:
            ValueError: wrong inputs, a cache of another kind, or one together with padding or `cu_seqlens`, or logits
                to be skipped that are needed.
        """
        if past_key_values is not None and not isinstance(past_key_values, ChelaCache):
            raise ValueError(
                f"the cache of a CHELA model is a ChelaCache, got a {type(past_key_values).__name__}: "
                "leave past_key_values out of the first call, which makes one"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None and cu_seqlens is None
        cache = ChelaCache() if past_key_values is None and use_cache else past_key_values
        mask = as_mask(attention_mask, input_ids)
        if skip_logits is None:
            skip_logits = self.training and labels is not None and cache is None and self._own_loss()
        if skip_logits:
            if labels is None or cache is not None or not self._own_loss():
                raise ValueError("skip_logits needs labels, no cache, and the model's own head and loss function")
            loss = self._loss_alone(input_ids, labels, mask, cu_seqlens, num_items_in_batch, impl)
            return answer(self, CausalLMOutputWithPast(loss=loss), return_dict)  # pyrefly: ignore
        if cache is None:
            x, _ = self.chela.backbone(input_ids, mask=mask, cu_seqlens=cu_seqlens, impl=impl)
            logits = self.chela.head(x[:, -logits_to_keep:])
        elif cu_seqlens is not None:
            raise ValueError("cu_seqlens and a cache exclude each other: pass use_cache=False")
        else:
            logits = self._read(input_ids, mask, cache, logits_to_keep, impl)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab, num_items_in_batch=num_items_in_batch
            )
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # pyrefly: ignore
        return answer(self, output, return_dict)

    def _own_loss(self) -> bool:
        """Whether weight and bias of the head say all: no adapter, hook or loss function of someone else's is there."""
        head = self.chela.head
        hooked = head._forward_hooks or head._forward_pre_hooks
        return type(head) is nn.Linear and not hooked and not hasattr(self, "_loss_function")

    def _loss_alone(
        self,
        tokens: Tensor,
        labels: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        count: Tensor | int | None,
        impl: Impl,
    ) -> Tensor:
        """The loss of transformers' `ForCausalLMLoss`, from slices of positions."""
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED).to(tokens.device)
        loss, _, _ = self.chela.loss(tokens, following, mask, cu_seqlens, impl=impl)
        if count is None:
            count = (following != IGNORED).sum()
        return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)

    def _read(self, tokens: Tensor, mask: Tensor | None, cache: ChelaCache, keep: int, impl: Impl) -> Tensor:
        """Logits [B, keep, vocab] of tokens that follow on a cache, which is moved on."""
        state = cache.state
        if state is not None and mask is not None:
            if not bool(mask.all()):
                raise ValueError("padding cannot stand between a cache and its tokens: pad a batch on its first call")
            mask = None
        if state is not None and tokens.shape[1] == 1 and not torch.is_grad_enabled():
            one_place = len(set(getattr(self, "hf_device_map", {}).values())) < 2
            logits = cache.decoder(self.chela, impl, record=one_place).step(tokens.squeeze(1))
            logits = logits.unsqueeze(1).clone()  # the next step may write where these lie
        else:
            logits, cache.state = self.chela.prefill(tokens, mask, state, last=keep, impl=impl)
        cache.seen += tokens.shape[1]
        return logits

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:  # pyrefly: ignore
        """What a step of `generate` passes to `forward`: no mask where nothing is padded."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # pyrefly: ignore
        inputs = {name: value for name, value in inputs.items() if name in _ARGUMENTS}  # not what steers the loop
        mask, cache, tokens = inputs.get("attention_mask"), inputs.get("past_key_values"), inputs["input_ids"]
        assert tokens is not None
        follows = isinstance(cache, ChelaCache) and cache.state is not None and tokens.shape[1] == 1
        if mask is not None and (follows or bool(mask.all())):
            del inputs["attention_mask"]
        return inputs

    def _prepare_cache_for_generation(  # pyrefly: ignore
        self, generation_config: Any, model_kwargs: dict[str, Any], *shapes: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}: a CHELA model has one cache, "
                "whose size the kernel bounds; leave it out"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = ChelaCache()


_ARGUMENTS = frozenset(inspect.signature(ChelaForCausalLM.forward).parameters)
