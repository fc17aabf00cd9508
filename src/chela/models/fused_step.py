"""A token through a whole model in few launches: weights cast and joined once, chains of small operations fused.

The numbers are those of `CausalLM.step`, whose float32 sums are kept and whose roundings to the type of the products
are the same or fewer. It is made for a state, which it changes in place, and fits CHELA's blocks and the Transformer's
in the forms that language models take; `fused_step` says None to all others, whose blocks then step as they are.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from chela.layers import ChelaBlock, LayerState
from chela.layers.feed_forward import SwiGLU
from chela.layers.long_kernel import FoldedKernel
from chela.layers.norms import LayerNorm, RMSNorm, ScaleNorm
from chela.models.causal_lm import CausalLM
from chela.models.state import ChelaState
from chela.models.transformer import KeyValues, RotaryAttention, TransformerBlock, rotary_rates
from chela.ops import decoding
from chela.ops.decoding import Convolutions, Heads, Norm
from chela.ops.impl import Impl, resolve
from chela.ops.long_conv.online import OnlineState

WIDEST = 8192
"""Most channels of a norm that a program holds."""


class _Product:
    """`activation(x W^T + b)` by weights that are cast, and joined where several meet the same x, once."""

    def __init__(self, dtype: torch.dtype, *parts: nn.Linear, activation: decoding.Activation = "none") -> None:
        biases = [part.bias for part in parts]
        self.weight = torch.cat([part.weight.detach().to(dtype) for part in parts])
        self.bias = None if biases[0] is None else torch.cat([bias.detach().to(dtype) for bias in biases])
        self.activation: decoding.Activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        return decoding.product(x, self.weight, self.bias, self.activation)


class _ChelaStep:
    def __init__(self, block: ChelaBlock, dtype: torch.dtype) -> None:
        layer, attention, convolution = block.layer, block.layer.attention, block.layer.convolution
        assert attention is not None
        assert isinstance(convolution.kernel, FoldedKernel)
        self.norm, self.feed_forward_norm = _norm(block.layer_norm), _norm(block.feed_forward_norm)
        self.convolutions = Convolutions(
            convolution.short_weight.detach(),  # pyrefly: ignore
            convolution.short_bias.detach(),  # pyrefly: ignore
            convolution.kernel.bias,
        )
        gains = (attention.q_gain, attention.q_bias, attention.k_gain, attention.k_bias)
        self.heads = Heads(
            *(gain.detach().float() for gain in gains),
            decay=None if attention.decay_logit is None else torch.sigmoid(attention.decay_logit.detach().float()),
            norm_gain=None if attention.norm_gain is None else attention.norm_gain.detach().float(),
            scale=attention.scale,
        )
        self.from_z = _Product(dtype, attention.from_z, layer.gates)  # basis, gate, h, p
        self.from_x, self.out = _Product(dtype, attention.from_x), _Product(dtype, attention.out)
        self.feed_forward = None
        if block.feed_forward is not None:
            self.feed_forward = _feed_forward(block.feed_forward, dtype)

    def __call__(self, x: Tensor, more: Tensor | None, state: LayerState) -> tuple[Tensor, Tensor | None]:
        """The stream after the gate, and what the feed-forward part will add to it."""
        short, long = state.convolution
        x, y, z = decoding.convolve(x, more, self.norm, self.convolutions, short, long)  # pyrefly: ignore
        mixed = self.from_z(z)
        m = decoding.attend(mixed, self.from_x(y), self.heads, state.attention)  # pyrefly: ignore
        x, y = decoding.gate(mixed, self.out(m), x, self.feed_forward_norm)
        if self.feed_forward is None:
            return x, None
        first, last = self.feed_forward
        return x, last(first(y))


def _feed_forward(part: nn.Module, dtype: torch.dtype) -> tuple[_Product, _Product]:
    if isinstance(part, SwiGLU):
        activation = "bounded-swiglu" if part.bounded else "swiglu"
        return _Product(dtype, part.gate_up, activation=activation), _Product(dtype, part.down)
    assert isinstance(part, nn.Sequential)
    first, last = part[0], part[3]
    return _Product(dtype, first, activation="silu"), _Product(dtype, last)  # pyrefly: ignore


class _TransformerStep:
    def __init__(self, block: TransformerBlock, dtype: torch.dtype) -> None:
        assert isinstance(block.mixer, RotaryAttention)
        self.dtype, self.norm, self.feed_forward_norm = dtype, _norm(block.mixer_norm), _norm(block.feed_forward_norm)
        self.qkv, self.out = _Product(dtype, block.mixer.qkv), _Product(dtype, block.mixer.out)
        self.rates = rotary_rates(block.mixer.qkv.in_features // block.mixer.heads, self.qkv.weight.device)
        self.feed_forward = None
        if block.feed_forward is not None:
            self.feed_forward = _feed_forward(block.feed_forward, dtype)

    def __call__(self, x: Tensor, more: Tensor, state: KeyValues, position: Tensor) -> tuple[Tensor, Tensor]:
        x, y = decoding.add_norm(x, more, self.norm, self.dtype)
        attended = decoding.cached_attention(self.qkv(y), self.rates, position, state.keys, state.values, state.begins)
        mixed = self.out(attended)
        if self.feed_forward is None:
            return x, mixed
        x, y = decoding.add_norm(x, mixed, self.feed_forward_norm, self.dtype)
        gate_up, down = self.feed_forward
        return x, down(gate_up(y))


class FusedStep:
    """Tokens of a model, one a row, to the logits of the next; the state is changed in place but for its clocks.

    Args:
        model: one that `fused_step` takes.
        state: the first of those to come, of `CausalLM.online`.
        dtype: of the products.
    """

    def __init__(self, model: CausalLM, state: ChelaState, dtype: torch.dtype) -> None:
        step = _ChelaStep if model.config.mixer == "chela" else _TransformerStep
        self._blocks: list[Any] = [step(block, dtype) for block in model.backbone.blocks]  # pyrefly: ignore
        self._dtype, self._last_norm = dtype, _norm(model.backbone.last_norm)
        self._embedding, self._head = model.backbone.embedding.tokens, _Product(dtype, model.head)
        self._position = self._embedding.weight.new_zeros(1, dtype=torch.int64)
        self.go_to(state)

    def go_to(self, state: ChelaState) -> None:
        """Set the place of the next token: after that many, for all rows; states of CHELA carry their own."""
        if isinstance(layer := state.layers[0], KeyValues):
            self._position.fill_(layer.length)

    def __call__(self, token: Int[Tensor, " b"], state: ChelaState) -> Float[Tensor, "b vocab"]:
        """Logits after a token a row, int64 [B]; nothing here depends on what Python knows of the clocks."""
        x = self._embedding(token).float()
        more = None
        longs = [layer.convolution.long for layer in state.layers if isinstance(layer, LayerState)]
        if longs:
            for block, layer in zip(self._blocks, state.layers, strict=True):
                x, more = block(x, more, layer)
            torch._foreach_add_([long.position for long in longs], 1)  # pyrefly: ignore
        else:
            more = torch.zeros_like(x)
            for block, layer in zip(self._blocks, state.layers, strict=True):
                x, more = block(x, more, layer, self._position)
            self._position += 1
        more = torch.zeros_like(x) if more is None else more
        return self._head(decoding.add_norm(x, more, self._last_norm, self._dtype)[1])


def fused_step(model: CausalLM, state: ChelaState, impl: Impl) -> FusedStep | None:
    """The fused step of a model, in autocast's type where autocast is on, or None where it has none.

    Args:
        model: in evaluation mode.
        state: of `CausalLM.online`.
        impl: "auto" takes the fused step on CUDA, "triton" in Triton's interpreter, too.
    """
    weight = model.head.weight
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if resolve(impl, weight.device, "long_conv") != "triton" or weight.dtype == torch.float64:
        return None
    if model.config.d_model > WIDEST or _norm(model.backbone.last_norm) is None:
        return None
    for block, layer in zip(model.backbone.blocks, state.layers, strict=True):
        if not (_chela_fits(block, layer) or _transformer_fits(block, layer)):
            return None
    return FusedStep(model, state, dtype)


def _chela_fits(block: nn.Module, state: object) -> bool:
    if not isinstance(block, ChelaBlock) or not isinstance(state, LayerState):
        return False
    attention, convolution = block.layer.attention, block.layer.convolution
    if attention is None or attention.norm == "sum" or state.attention is None:
        return False
    key, value = state.attention.shape[2:]
    small = max(16, decoding.power(key)) * max(16, decoding.power(value)) <= decoding.LARGEST_HEAD
    long, normed = state.convolution.long, _norm(block.layer_norm) is not None
    return small and normed and block.prenorm and convolution.short_weight is not None and isinstance(long, OnlineState)


def _transformer_fits(block: nn.Module, state: object) -> bool:
    return (
        isinstance(block, TransformerBlock)
        and isinstance(block.mixer, RotaryAttention)
        and isinstance(state, KeyValues)
        and state.in_place
        and _norm(block.mixer_norm) is not None
    )


def _norm(norm: nn.Module | None) -> Any:
    """What the kernels are told of a norm; None of one that they do not take."""
    if norm is None:
        return Norm("none")
    if isinstance(norm, LayerNorm):
        return Norm("layer", norm.weight.detach(), norm.bias.detach())
    if isinstance(norm, RMSNorm):
        return Norm("rms", norm.weight.detach())
    return Norm("scale", norm.gain.detach()) if isinstance(norm, ScaleNorm) else None
