"""Models as graphs of torch's own operations (`torch.export`): they also run where chela is not installed."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional as F

from chela.layers import LayerState
from chela.models.causal_lm import CausalLM
from chela.models.classifier import Classifier, TwoTowerClassifier
from chela.models.state import ChelaState


class _Forward(nn.Module):
    def __init__(self, model: Classifier | CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, mask: Bool[Tensor, "b t"]) -> Tensor:
        return self.model(inputs, mask, impl="reference")


class _Step(nn.Module):
    def __init__(self, model: CausalLM, state: ChelaState) -> None:
        super().__init__()
        self.model, self.like = model, state

    def forward(self, token: Int[Tensor, " b"], state: list[Tensor]) -> tuple[Float[Tensor, "b vocab"], list[Tensor]]:
        parts = iter(state)
        logits, after = self.model.step(token, self.like.map(lambda _: next(parts)), impl="reference")
        return logits, after.tensors()


def export_forward(model: Classifier | CausalLM) -> ExportedProgram:
    """Export the whole forward, for any batch size and any length from 1 (a classifier's: up to its kernel length).

    The graph takes `inputs`, tokens int64 [B, T] or real values [B, T, C], and `mask`, bool [B, T], True at real
    positions (padding on either side; all True where nothing is padded), and gives the model's logits.

    Args:
        model: in evaluation mode, on any device; its implementation is the reference.

    Raises:
        ValueError: a model of another kind, or in training mode.
    """
    _check(model, (Classifier, CausalLM))
    config, device = model.config, next(model.parameters()).device
    longest = config.kernel_length if isinstance(model, Classifier) and config.kernel_length else None
    batch, length = 2, min(70, longest or 70)
    inputs = torch.zeros(batch, length, dtype=torch.long, device=device)
    if config.inputs == "real":
        inputs = torch.zeros(batch, length, config.channels, device=device)
    sizes = {0: Dim("batch", min=1), 1: Dim("length", min=1, max=longest)}
    mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    with torch.no_grad():
        return export(_Forward(model).eval(), (inputs, mask), dynamic_shapes={"inputs": sizes, "mask": sizes})


def export_step(model: CausalLM) -> ExportedProgram:
    """Export one step of decoding, for any batch size.

    The graph takes `token`, int64 [B], and `state`, the list of tensors of a state of full size (`full_state`,
    `empty_state`), and gives logits [B, vocab] and the list of the next state, of the same shapes. The long convolution
    is a dot product over its kernel: O(L) a token.

    Args:
        model: in evaluation mode, on any device; merged, a step does not fold its kernels anew.

    Raises:
        ValueError: a model of another kind, or in training mode.
    """
    _check(model, (CausalLM,))
    state = empty_state(model, 2)
    token = torch.zeros(2, dtype=torch.long, device=next(model.parameters()).device)
    batch = {0: Dim("batch", min=1)}
    shapes = {"token": batch, "state": [batch for _ in state.tensors()]}
    with torch.no_grad():
        return export(_Step(model, state).eval(), (token, state.tensors()), dynamic_shapes=shapes)


def full_state(model: CausalLM, state: ChelaState) -> ChelaState:
    """The same state with room for all L-1 inputs of the long convolution: its shapes no longer change with the steps.

    Raises:
        ValueError: not a plain state of a CHELA model.
    """
    reach = max(0, model.config.kernel_length - 1)
    layers = []
    for layer in state.layers:
        if not isinstance(layer, LayerState) or not isinstance(layer.convolution.long, Tensor | None):
            raise ValueError("only plain states of CHELA's own layers have a full size: take one of prefill or step")
        long = layer.convolution.long
        if long is not None:
            long = F.pad(long, (0, 0, reach - long.shape[1], 0))  # zeros: nothing came before
        layers.append(layer._replace(convolution=layer.convolution._replace(long=long)))
    return ChelaState(tuple(layers))


@torch.no_grad()
def empty_state(model: CausalLM, batch_size: int = 1) -> ChelaState:
    """The state of full size before the first token."""
    device = next(model.parameters()).device
    _, state = model.prefill(torch.zeros(batch_size, 1, dtype=torch.long, device=device))
    return full_state(model, state).map(torch.zeros_like)


def _check(model: nn.Module, kinds: tuple[type, ...]) -> None:
    if not isinstance(model, kinds) or isinstance(model, TwoTowerClassifier):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"only a {names} is exported, got a {type(model).__name__}")
    if model.config.mixer != "chela":
        raise ValueError(f"only CHELA's own layers are exported, not those of {model.config.mixer}")
    if model.training:
        raise ValueError("a model is exported in evaluation mode: call model.eval() first")
