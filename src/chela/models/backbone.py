"""The stack of blocks between an embedding and a head."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chela.config import ModelConfig
from chela.layers import LayerState, ShortLongConv
from chela.layers.norms import make_norm
from chela.models.blocks import make_block
from chela.models.lookup import Symbols
from chela.models.state import ChelaState
from chela.models.transformer import KeyValues
from chela.ops.impl import Impl


class Embedding(nn.Module):
    """Symbols or real values to vectors of width D."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.inputs, self.vocab, self.channels = config.inputs, config.vocab, config.channels
        self.dropout = config.token_dropout
        if config.inputs == "tokens":
            self.tokens: nn.Embedding = Symbols(config.vocab, config.d_model)
        else:
            self.values = nn.Linear(config.channels, config.d_model)

    def forward(self, inputs: Tensor) -> Float[Tensor, "b t d"]:
        """Embed int64 or int32 [B, T] or real values [B, T, C].

        While training, whole steps are dropped: their vectors are zero, and the others are not scaled up (word dropout,
        Iyyer et al. 2015).

        Raises:
            ValueError: what `check` refuses; a token id out of range (on a CPU; a GPU is not synchronised for it).
        """
        self.check(inputs)
        if self.inputs == "real":
            return self._drop(self.values(inputs))
        if inputs.device.type == "cpu" and inputs.numel() and not torch.compiler.is_compiling():
            low, high = int(inputs.min()), int(inputs.max())
            if low < 0 or high >= self.vocab:
                wrong = low if low < 0 else high
                raise ValueError(f"token id {wrong} is outside the model's vocabulary 0..{self.vocab - 1}")
        return self._drop(self.tokens(inputs))

    def check(self, inputs: Tensor) -> None:
        """Refuse what is no batch of inputs.

        Raises:
            ValueError: no tensor, wrong shape or type.
        """
        real = self.inputs == "real"
        wanted = f"real values [B, T, {self.channels}]" if real else "tokens [B, T] of type int64 or int32"
        if not isinstance(inputs, Tensor):
            raise ValueError(f"the model reads a tensor, {wanted}; got {type(inputs).__name__}")
        typed = inputs.is_floating_point() if real else inputs.dtype in (torch.int64, torch.int32)
        if not typed or inputs.ndim != (3 if real else 2) or (real and inputs.shape[2] != self.channels):
            raise ValueError(f"the model reads {wanted}, got {inputs.dtype} {tuple(inputs.shape)}")

    def _drop(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        if not self.training or self.dropout == 0:
            return x
        return x.masked_fill(torch.rand(x.shape[:2], device=x.device).unsqueeze(2) < self.dropout, 0.0)


class Backbone(nn.Module):
    """Embedding, blocks and, before pre-norm heads, a last norm: inputs to vectors [B, T, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(make_block(config) for _ in range(config.layers))
        self.last_norm = make_norm(config.norm, config.d_model) if config.prenorm else None
        self.checkpoint_blocks = False
        """While training, keep each block's input alone and compute the block again for its gradient."""

    def forward(
        self,
        inputs: Tensor,
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        state: ChelaState | None = None,
        return_state: bool = False,
        cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
        impl: Impl = "auto",
    ) -> tuple[Float[Tensor, "b t d"], ChelaState | None]:
        """Run the stack over tokens [B, T] or real values [B, T, C]; arguments as `ChelaLayer`'s.

        Raises:
            ValueError: wrong inputs, or a state of another depth.
        """
        if state is not None and len(state.layers) != len(self.blocks):
            raise ValueError(f"the state has {len(state.layers)} layers, the model {len(self.blocks)}")
        x = self.embedding(inputs)
        after: list[Any] = []
        for index, block in enumerate(self.blocks):
            x, layer_state = self._run(
                block,
                x,
                mask=mask,
                state=state.layers[index] if state else None,
                return_state=return_state,
                cu_seqlens=cu_seqlens,
                impl=impl,
            )
            after.append(layer_state)
        if self.last_norm is not None:
            x = self.last_norm(x, mask)
        return x, ChelaState(tuple(after)) if return_state else None

    def _run(self, block: nn.Module, x: Tensor, **options: Any) -> tuple[Tensor, LayerState | KeyValues | None]:
        if self.checkpoint_blocks and self.training and torch.is_grad_enabled():
            # a CUDA graph cannot set a generator back, so nothing is set back where nothing is drawn
            drawn = self.config.dropout > 0 or self.config.tap_dropout > 0
            return checkpoint(block, x, use_reentrant=False, preserve_rng_state=drawn, **options)
        return block(x, **options)


def merge(model: nn.Module) -> None:
    """Fold the branches of every short-long convolution in `model`, in place."""
    for module in model.modules():
        if isinstance(module, ShortLongConv):
            module.merge()
