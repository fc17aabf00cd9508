"""The norms a block can take. All share one call, `norm(x, mask)`, since batch norm alone must know the padding."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from chela.ops.batch_norm import batch_norm
from chela.ops.impl import Impl, resolve
from chela.ops.moments import Moments

NormKind = Literal["layer", "rms", "scale", "batch"]


def make_norm(kind: NormKind, d_model: int) -> nn.Module:
    """Build a norm over the last dimension of `[B, T, D]`, called as `norm(x, mask)`.

    Raises:
        ValueError: unknown kind.
    """
    kinds = {"layer": LayerNorm, "rms": RMSNorm, "scale": ScaleNorm, "batch": BatchNorm}
    if kind not in kinds:
        raise ValueError(f"norm must be one of {', '.join(kinds)}; got {kind!r}")
    return kinds[kind](d_model)


class LayerNorm(nn.LayerNorm):
    """Layer norm (Ba et al. 2016) per position; padding has no influence."""

    def forward(  # pyrefly: ignore
        self, x: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """Normalise each position over D."""
        return super().forward(x)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm (Zhang and Sennrich 2019) per position; padding has no influence."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, eps=1e-6)

    def forward(self, x: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"] | None = None) -> Float[Tensor, "b t d"]:
        """Normalise each position over D."""
        return super().forward(x)


class ScaleNorm(nn.Module):
    """One learned length for every position's vector (Nguyen and Salazar 2019): `g x / rms(x)`, g a scalar."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"] | None = None) -> Float[Tensor, "b t d"]:
        """Normalise each position over D."""
        return nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6) * self.gain.to(x.dtype)


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over all real positions of all sequences: statistics leave padding out.

    Under data parallelism the statistics are those of each process's own slice.
    """

    def forward(  # pyrefly: ignore
        self,
        x: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b t"] | None = None,
        *,
        dtype: torch.dtype | None = None,
        impl: Impl = "auto",
    ) -> Float[Tensor, "b t d"]:
        """Normalise each channel over B and T; the result is of that dtype, x's by default."""
        plain = resolve(impl, x.device, "batch_norm") == "reference"
        if not self.training or (plain and mask is None):  # torch's own goes over x fewer times than the reference
            return super().forward(x.flatten(0, 1)).view_as(x).to(x.dtype if dtype is None else dtype)
        y, moments = batch_norm(x, self.weight, self.bias, mask=mask, eps=self.eps, dtype=dtype, impl=impl)
        self._follow(moments)
        return y

    def statistics(self, moments: Moments | None) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
        """Mean of each channel and inverse of its standard deviation: what x is normalised with.

        Args:
            moments: of x, while training; the running ones follow them. None takes the running ones.
        """
        if moments is not None:
            self._follow(moments)
            return moments.mean, torch.rsqrt(moments.variance + self.eps)
        assert self.running_mean is not None
        assert self.running_var is not None
        return self.running_mean, torch.rsqrt(self.running_var + self.eps)

    def _follow(self, moments: Moments) -> None:
        """Move the running statistics towards a batch's."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        mean, variance, count = moments
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
