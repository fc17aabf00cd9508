"""The causal language model: whole sequences, prefill, and one token at a time on an explicit state."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from chela.config import ModelConfig
from chela.layers import ChelaBlock, LayerState
from chela.models.backbone import Backbone, merge
from chela.models.chunked_loss import chunked_cross_entropy
from chela.models.state import ChelaState
from chela.models.transformer import KeyValues, initialise, with_room
from chela.ops.impl import Impl


class CausalLM(nn.Module):
    """Predict the next token.

    Whole forward, prefill in any pieces and single steps give the same numbers to rounding. Sequences may be longer
    than the kernel: the convolution then sees the last L inputs, the attention everything.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not config.causal:
            raise ValueError("a language model is causal: set model.causal true")
        self.config = config
        self.backbone = Backbone(config)
        self.head = nn.Linear(config.d_model, config.vocab)
        if config.mixer != "chela":
            initialise(self, config.layers)

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        mask: Bool[Tensor, "b t"] | None = None,
        cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
        *,
        impl: Impl = "auto",
    ) -> Float[Tensor, "b t vocab"]:
        """Logits [B, T, vocab] of the token after each position.

        Args:
            tokens: int64 [B, T].
            mask: True at real tokens; padding may be left or right.
            cu_seqlens: int32 [N+1], document boundaries of a packed batch (B = 1).
            impl: implementation of the ops.

        Raises:
            ValueError: wrong inputs.
        """
        x, _ = self.backbone(tokens, mask=mask, cu_seqlens=cu_seqlens, impl=impl)
        return self.head(x)

    def loss(
        self,
        tokens: Int[Tensor, "b t"],
        labels: Int[Tensor, "b t"],
        mask: Bool[Tensor, "b t"] | None = None,
        cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
        *,
        state: ChelaState | None = None,
        return_state: bool = False,
        impl: Impl = "auto",
    ) -> tuple[Float[Tensor, ""], Int[Tensor, ""], ChelaState | None]:
        """Sum of the cross-entropy in nats and number of hits over a batch, without its logits in memory.

        Args:
            tokens: int64 [B, T].
            labels: the token after each position, int64 [B, T]; -100 where there is none.
            mask: True at real tokens.
            cu_seqlens: int32 [N+1], document boundaries of a packed batch (B = 1).
            state: what an earlier piece returned; its gradient is cut if it was detached.
            return_state: also return the state after the last position.
            impl: implementation of the ops.

        Returns:
            Loss and hits (see `chunked_cross_entropy`) and the state, or None.

        Raises:
            ValueError: wrong inputs, or mask together with state.
        """
        x, after = self.backbone(
            tokens, mask=mask, state=state, return_state=return_state, cu_seqlens=cu_seqlens, impl=impl
        )
        return *chunked_cross_entropy(x, self.head.weight, self.head.bias, labels), after

    def prefill(
        self,
        tokens: Int[Tensor, "b t"],
        mask: Bool[Tensor, "b t"] | None = None,
        state: ChelaState | None = None,
        *,
        last: int = 0,
        impl: Impl = "auto",
    ) -> tuple[Float[Tensor, "b t vocab"], ChelaState]:
        """Read a piece of a sequence: logits [B, T, vocab] and the state after it.

        Args:
            tokens: int64 [B, T], T >= 1.
            mask: True at real tokens, padding on either side; only for a first piece.
            state: what an earlier piece returned.
            last: logits of so many last positions alone, which for a long prompt takes far less memory; 0 of all.
            impl: implementation of the ops.

        Raises:
            ValueError: wrong inputs, or mask together with state.
        """
        if mask is None:
            x, after = self.backbone(tokens, state=state, return_state=True, impl=impl)
        else:
            # A state must not see padding after its tokens, so all padding goes to the front and the result back.
            order = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)  # [B, T]
            x, after = self.backbone(
                tokens.gather(1, order), mask=mask.gather(1, order), state=state, return_state=True, impl=impl
            )
            x = torch.empty_like(x).scatter(1, order.unsqueeze(-1).expand_as(x), x)
        assert after is not None
        return self.head(x[:, -last:]), after

    def step(
        self, token: Int[Tensor, " b"], state: ChelaState, *, impl: Impl = "auto"
    ) -> tuple[Float[Tensor, "b vocab"], ChelaState]:
        """Read one token a row, int64 [B]: logits [B, vocab] and the state after it.

        From a state of `online` a step costs O(log^2 L), for a kernel of L taps, and the state is changed in place;
        from a plain one it costs as much as the context is long.

        Raises:
            ValueError: wrong inputs or a state of another model.
        """
        logits, after = self.prefill(token.unsqueeze(1), state=state, impl=impl)
        return logits.squeeze(1), after

    def online(self, state: ChelaState, *, room: int = 0) -> ChelaState:
        """Make a state ready for many steps, whose cost then hardly grows with the context; for a merged model.

        The numbers stay the same to rounding. Reading more than one token on such a state is fine and gives a plain
        one. No gradients flow through it: step under `torch.no_grad()` or `torch.inference_mode()`. A Transformer's
        cost grows with the context all the same; its keys and values are then written in place.

        Args:
            state: of `prefill` or `step`.
            room: steps that a Transformer's keys and values have room for before it doubles; 0 doubles it at once.

        Raises:
            ValueError: the model is not merged, or the state is of another model.
        """
        if len(state.layers) != len(self.backbone.blocks):
            raise ValueError(f"the state has {len(state.layers)} layers, the model {len(self.backbone.blocks)}")
        layers: list[LayerState | KeyValues] = []
        for block, layer in zip(self.backbone.blocks, state.layers, strict=True):
            if isinstance(layer, KeyValues):
                layers.append(with_room(layer, room))
                continue
            assert isinstance(block, ChelaBlock)
            layers.append(layer._replace(convolution=block.layer.convolution.online(layer.convolution)))
        return ChelaState(tuple(layers))

    def merge(self) -> None:
        """Fold the branches of every convolution in place: for inference, and one kernel to fold less a step."""
        merge(self)
        self.config = replace(self.config, merged=True)
