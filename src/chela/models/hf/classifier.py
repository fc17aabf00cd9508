"""The sequence classifier: labels to loss."""

from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from chela.models.classifier import Classifier
from chela.models.hf.base import RunModel, answer, as_mask, pick_inputs
from chela.models.hf.config import Kind
from chela.ops.impl import Impl


class ChelaForSequenceClassification(RunModel):
    """`Classifier` with labels."""

    kind: ClassVar[Kind] = "classifier"
    accepts_loss_kwargs = False
    chela: Classifier

    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        attention_mask: Tensor | None = None,
        input_values: Float[Tensor, "b t c"] | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        impl: Impl = "auto",
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Logits [B, num_labels].

        Args:
            input_ids: int64 [B, T], for a model that reads tokens.
            attention_mask: [B, T], nonzero at real positions; padding may be left or right. None says that nothing
                is padded.
            input_values: floats [B, T, C], for a model that reads real values.
            labels: int64 [B], or what `config.problem_type` asks for.
            return_dict: False returns a tuple; None asks the config.
            impl: implementation of the ops.

        Raises:
            ValueError: wrong inputs or sequences longer than the kernel.
        """
        inputs = pick_inputs(self.config, input_ids, input_values)
        logits = self.chela(inputs, as_mask(attention_mask, inputs), impl=impl)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return answer(self, SequenceClassifierOutput(loss=loss, logits=logits), return_dict)
