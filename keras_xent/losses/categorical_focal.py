"""Focal cross-entropy of distributions over the classes."""

from typing import Any

import keras
from keras import ops

from keras_xent import arguments
from keras_xent._types import DType, Reduction, Tensor
from keras_xent.kernels._dtypes import dtype_of
from keras_xent.kernels._labels import weights_tensor
from keras_xent.losses.base import Unreduced
from keras_xent.losses.categorical import CategoricalCrossentropy


@keras.saving.register_keras_serializable(package="keras_xent")
class CategoricalFocalCrossentropy(CategoricalCrossentropy):
    """Categorical cross-entropy that gives easy examples less weight.

    For one-hot or soft labels of unbalanced classes. A drop-in for `keras.losses.CategoricalFocalCrossentropy`: same
    arguments, defaults and values. For integer labels use `SparseCategoricalCrossentropy(focal_gamma=...)`.

    Formula: `-sum_c alpha_c (1 - p_c)^gamma y_c log p_c`.

    Args:
        alpha: one weight for all classes, or a list with one for each; either may be a variable.
        gamma: exponent of the focal factor; 0 for plain cross-entropy.
        from_logits: whether `y_pred` holds logits rather than probabilities.
        label_smoothing: share in [0, 1] of the target spread evenly over all classes.
        axis: the class axis.
        reduction: `"sum_over_batch_size"`, `"mean"`, `"mean_with_sample_weight"`, `"sum"`, `"none"`,
            `"token_mean"` (the weighted mean over valid examples on all replicas) or
            `"sequence_mean"` (the mean over examples of each one's mean).
        name: name of the loss.
        dtype: dtype of the result (default float32).

    Call arguments: `y_true` and `y_pred` `[..., C]`, `sample_weight` a scalar, `[B]`, `[B, 1]` or `[...]`.

    Raises:
        ValueError: an argument out of its range; shapes that do not fit.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> loss = kx.losses.CategoricalFocalCrossentropy(alpha=0.25, gamma=2.0)
    >>> round(float(loss(np.array([[0.0, 1.0]]), np.array([[0.5, 0.5]], "float32"))), 4)  # 0.25 times 0.5^2 times ln 2
    0.0433

    In a model:

    >>> import keras
    >>> model = keras.Sequential([keras.layers.Dense(3)])
    >>> model.compile("adam", kx.losses.CategoricalFocalCrossentropy(from_logits=True))

    References: arXiv:1708.02002.
    """

    def __init__(
        self,
        alpha: Any = 0.25,
        gamma: float = 2.0,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        axis: int = -1,
        reduction: Reduction | None = "sum_over_batch_size",
        name: str | None = "categorical_focal_crossentropy",
        dtype: DType = None,
    ) -> None:
        self.alpha = arguments.label_weights("alpha", alpha)
        self.gamma = arguments.not_negative("gamma", gamma)
        # A list, or a variable of one axis.
        is_of_classes = isinstance(self.alpha, list) or len(getattr(self.alpha, "shape", ())) == 1
        super().__init__(
            from_logits,
            label_smoothing,
            axis,
            reduction,
            name,
            dtype,
            class_weight=self.alpha if is_of_classes else None,
            focal_gamma=gamma,
        )

    def _key_of_program(self) -> tuple | None:
        key = super()._key_of_program()
        return None if key is None or arguments.is_variable(self.alpha) else (*key, self.alpha)

    def _of_logits(self, y_true: Tensor, logits: Tensor, valid: Tensor) -> Unreduced:
        unreduced = super()._of_logits(y_true, logits, valid)
        if self.class_weight is not None or self.alpha is None:
            return unreduced
        # One weight for all classes is a factor of the loss, no class weight of a mean.
        alpha = weights_tensor("alpha", self.alpha, dtype_of(unreduced.losses))
        return unreduced._replace(losses=ops.multiply(unreduced.losses, alpha))
