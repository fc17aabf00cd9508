"""Sequence classifiers: one sequence, or a pair."""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from chela.config import ModelConfig
from chela.models.backbone import Backbone, merge
from chela.ops.impl import Impl


class Pooling(nn.Module):
    """Sum up a sequence of vectors in one; padding never counts.

    "mean" over the real positions, the "first" or "last" real one, or a learned "query" that weighs them (softmax).
    """

    def __init__(self, kind: Literal["mean", "first", "last", "query"], d_model: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "query":
            self.query = nn.Parameter(torch.zeros(d_model))  # starts as the mean

    def forward(self, x: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"] | None) -> Float[Tensor, "b d"]:
        """Pool `x` [B, T, D] to [B, D]."""
        if mask is None:
            mask = x.new_ones(x.shape[:2], dtype=torch.bool)
        if self.kind == "mean":
            return x.masked_fill(~mask.unsqueeze(-1), 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        if self.kind == "query":
            scores = (x.float() @ self.query.float()).masked_fill(~mask, -torch.inf)  # [B, T]
            weights = torch.softmax(scores, dim=1).unsqueeze(-1)
            return (x.masked_fill(~mask.unsqueeze(-1), 0) * weights).sum(1)
        steps = torch.arange(x.shape[1], device=x.device)
        if self.kind == "first":
            index = torch.where(mask, steps, x.shape[1] - 1).amin(1)
        else:
            index = torch.where(mask, steps, 0).amax(1)
        return x.gather(1, index[:, None, None].expand(-1, 1, x.shape[2])).squeeze(1)


class Classifier(nn.Module):
    """Classify a sequence of tokens or real values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.pooling = Pooling(config.pooling, config.d_model)
        self.head: nn.Module = nn.Linear(config.d_model, config.classes)

    def features(self, inputs: Tensor, mask: Bool[Tensor, "b t"] | None, impl: Impl) -> Float[Tensor, "b d"]:
        """Pooled vectors [B, D] of a batch of sequences.

        Raises:
            ValueError: wrong inputs, or sequences longer than the kernel.
        """
        self.backbone.embedding.check(inputs)
        length, reach = inputs.shape[1], self.config.kernel_length
        if reach and length > reach:
            raise ValueError(
                f"a sequence of {length} steps is longer than model.kernel_length {reach}: "
                "cut it, or train a model with a longer kernel"
            )
        x, _ = self.backbone(inputs, mask=mask, impl=impl)
        return self.pooling(x, mask)

    def forward(
        self, inputs: Tensor, mask: Bool[Tensor, "b t"] | None = None, *, impl: Impl = "auto"
    ) -> Float[Tensor, "b classes"]:
        """Logits of a batch.

        Args:
            inputs: tokens int64 [B, T] or real values [B, T, C].
            mask: True at real positions; padding may be left or right.
            impl: implementation of the ops.

        Raises:
            ValueError: wrong inputs or sequences longer than the kernel.
        """
        return self.head(self.features(inputs, mask, impl))

    def merge(self) -> None:
        """Fold the branches of every convolution in place: for inference."""
        merge(self)
        self.config = replace(self.config, merged=True)


class TwoTowerClassifier(Classifier):
    """Classify a pair of sequences: shared towers, then a head on `[a, b, a - b, a * b]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        d_model = config.d_model
        self.head = nn.Sequential(nn.Linear(4 * d_model, d_model), nn.GELU(), nn.Linear(d_model, config.classes))

    def forward(  # pyrefly: ignore
        self,
        first: Tensor,
        second: Tensor,
        first_mask: Bool[Tensor, "b t"] | None = None,
        second_mask: Bool[Tensor, "b t2"] | None = None,
        *,
        impl: Impl = "auto",
    ) -> Float[Tensor, "b classes"]:
        """Logits of a batch of pairs; each side as `Classifier` takes it, lengths may differ.

        Raises:
            ValueError: wrong inputs or sequences longer than the kernel.
        """
        a = self.features(first, first_mask, impl)
        b = self.features(second, second_mask, impl)
        return self.head(torch.cat([a, b, a - b, a * b], dim=-1))
