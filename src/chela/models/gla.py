"""Gated linear attention (Yang et al. 2024) of flash-linear-attention, as a mixer to measure CHELA against."""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class GatedLinear(nn.Module):
    """The layer `fla.layers.GatedLinearAttention` with its own defaults: keys half as wide as D, values as wide.

    Its kernels are Triton's: it needs a CUDA GPU. They cannot be traced by torch.compile.

    Args:
        d_model: width D.
        heads: number of heads H; D / 2 must be a multiple.

    Raises:
        ValueError: flash-linear-attention or what its layers import is not installed, or the widths do not fit.
    """

    def __init__(self, d_model: int, *, heads: int) -> None:
        super().__init__()
        if d_model % (2 * heads):
            raise ValueError(f"d_model {d_model} is not an even number a head, with {heads} heads")
        try:
            from fla.layers import GatedLinearAttention  # pyrefly: ignore
        except ImportError as error:
            raise ValueError(
                "model.mixer gla needs the package flash-linear-attention and what its layers import "
                f"({error.name or error} is missing): pip install flash-linear-attention transformers"
            ) from error

        self.layer = GatedLinearAttention(hidden_size=d_model, num_heads=heads)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        state: None = None,
        return_state: bool = False,
        cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
    ) -> tuple[Float[Tensor, "b t d"], None]:
        """Attend over `x` [B, T, D]; arguments as `RotaryAttention`'s.

        Raises:
            ValueError: a state is given or asked for.
        """
        if state is not None or return_state:
            raise ValueError("model.mixer gla is trained and evaluated, and keeps no state: it does not generate")
        packed = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        return self.layer(x, attention_mask=mask, **packed)[0], None
