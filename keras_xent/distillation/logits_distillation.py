"""Distillation of logits, for `keras.distillation.Distiller`."""

from typing import Any

import keras
from keras import ops

from keras_xent import _endings, arguments
from keras_xent._named_arguments import NamedArguments
from keras_xent._types import DivergenceName, Reduction, Tensor
from keras_xent.losses import Distillation


@keras.saving.register_keras_serializable(package="keras_xent")
class LogitsDistillation(NamedArguments, keras.distillation.DistillationLoss):
    """Distillation of the teacher's logits, in place of `keras.distillation.LogitsDistillation`.

    Keras' own, with its default loss, clips logits as if they were probabilities, and has gradient 0 where it clips.
    This one compares distributions, leaves masked tokens out, and in a compiled step does not store the logits where
    both models end in a `LogitsDense` or `TiedLogits`. Outputs in a list or dict are compared one by one, and their
    losses added.

    Formula, with `p = softmax(teacher / T)`, `q = softmax(student / T)` and `m = beta p + (1 - beta) q`: `"forward_kl"`
    is `T^2 KL(p || q)`, `"reverse_kl"` is `T^2 KL(q || p)`, `"jensen_shannon"` is
    `T^2 (beta KL(p || m) + (1 - beta) KL(q || m))`.

    Args:
        temperature: divides the logits of both models.
        divergence: `"forward_kl"`, `"reverse_kl"` or `"jensen_shannon"`.
        beta: weight of the teacher in the mixture of Jensen and Shannon, between 0 and 1.
        reduction: `"token_mean"`, the mean over all tokens that are not masked, or another reduction to a scalar.

    Raises:
        ValueError: an argument out of its range; shapes that do not fit.

    Warns:
        UserWarning: a model ends in a softmax or a sigmoid.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> loss = kx.distillation.LogitsDistillation(temperature=2.0)
    >>> round(float(loss.compute_loss(np.array([[2.0, 0.0, -3.0]]), np.array([[-1.0, 4.0, 0.0]]))), 4)
    5.0694

    References: arXiv:1503.02531.
    """

    def __init__(
        self,
        temperature: float = 3.0,
        divergence: DivergenceName = "forward_kl",
        *,
        beta: float = 0.5,
        reduction: Reduction = "token_mean",
    ) -> None:
        if reduction in (None, "none"):
            raise ValueError(f"`reduction` must give a scalar. Received: reduction={reduction!r}.")
        self._loss = Distillation(temperature, divergence, beta=beta, reduction=reduction)
        self.temperature, self.divergence, self.beta, self.reduction = temperature, divergence, beta, reduction

    def validate_model_compatibility(self, teacher: Any, student: Any) -> None:
        """Warns where a model is seen to end in probabilities. `Distiller` calls it."""
        for role, model in (("teacher", teacher), ("student", student)):
            for output in getattr(model, "outputs", None) or []:
                end = _endings.ending_of(output)
                if end is not None and end.kind in ("softmax", "sigmoid"):
                    arguments.warn(
                        f"{type(self).__name__} compares logits, but the {role} ends in layer '{end.layer}' with a "
                        f"{end.kind}. Remove the activation: not everywhere can it be undone."
                    )

    def compute_loss(self, teacher_outputs: Any, student_outputs: Any, **kwargs: Any) -> Tensor:
        """The divergence of the student's logits from the teacher's, a scalar."""
        _check_same_structure(teacher_outputs, student_outputs)
        losses = keras.tree.map_structure(self._loss, teacher_outputs, student_outputs)
        return sum(keras.tree.flatten(losses), start=ops.zeros(()))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LogitsDistillation":
        """The loss of a configuration."""
        return cls(**config)


def _check_same_structure(teacher_outputs, student_outputs):
    both = teacher_outputs, student_outputs
    # With shapes in place of the logits, which Keras' own message prints.
    teacher, student = (keras.tree.map_structure(lambda one: str(tuple(getattr(one, "shape", ()))), o) for o in both)
    try:
        keras.tree.assert_same_structure(teacher, student)
    except ValueError:
        raise ValueError(
            "`teacher_outputs` and `student_outputs` must have the same structure, so that each output of the student "
            f"has one of the teacher. Received: outputs of shapes {teacher} and {student}."
        ) from None
