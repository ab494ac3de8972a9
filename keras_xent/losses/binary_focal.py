"""Focal cross-entropy of independent yes-or-no labels."""

import keras

from keras_xent import arguments
from keras_xent._types import DType, Reduction
from keras_xent.losses.binary import BinaryCrossentropy


@keras.saving.register_keras_serializable(package="keras_xent")
class BinaryFocalCrossentropy(BinaryCrossentropy):
    """Binary cross-entropy that gives easy labels less weight, the mean over an example's labels.

    For binary labels of which one value is rare. A drop-in for `keras.losses.BinaryFocalCrossentropy`: same arguments,
    defaults and values. `BinaryCrossentropy` with `focal_gamma` and `focal_alpha` is the same loss, and takes more.

    Formula: `(1 - p_t)^gamma ce` with `p_t = y p + (1 - y) (1 - p)`; times `alpha y + (1 - alpha) (1 - y)` if balanced.

    Args:
        apply_class_balancing: whether positive labels have weight `alpha`, and negative ones `1 - alpha`.
        alpha: the weight of positive labels in [0, 1].
        gamma: exponent of the focal factor; 0 for plain cross-entropy.
        from_logits: whether `y_pred` holds logits rather than probabilities.
        label_smoothing: share in [0, 1] by which labels move to 1/2.
        axis: the axis of an example's labels; the loss is their mean.
        reduction: `"sum_over_batch_size"`, `"mean"`, `"mean_with_sample_weight"`, `"sum"`, `"none"`,
            `"token_mean"` (the weighted mean over valid examples on all replicas) or
            `"sequence_mean"` (the mean over examples of each one's mean).
        name: name of the loss.
        dtype: dtype of the result (default float32).

    Call arguments: `y_true` and `y_pred` `[..., L]`, `sample_weight` a scalar, `[B]`, `[B, 1]`, `[...]` or `[..., L]`.

    Raises:
        ValueError: an argument out of its range; shapes that do not fit; in eager mode, a label outside [0, 1].

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> loss = kx.losses.BinaryFocalCrossentropy(gamma=2.0)
    >>> round(float(loss(np.array([[1.0]]), np.array([[0.9]], "float32"))), 6)  # 0.1^2 times -ln 0.9
    0.001054

    In a model:

    >>> import keras
    >>> model = keras.Sequential([keras.layers.Dense(3)])
    >>> model.compile("adam", kx.losses.BinaryFocalCrossentropy(from_logits=True))

    References: arXiv:1708.02002.
    """

    def __init__(
        self,
        apply_class_balancing: bool = False,
        alpha: float = 0.25,
        gamma: float = 2.0,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        axis: int = -1,
        reduction: Reduction | None = "sum_over_batch_size",
        name: str | None = "binary_focal_crossentropy",
        dtype: DType = None,
    ) -> None:
        self.apply_class_balancing = arguments.boolean("apply_class_balancing", apply_class_balancing)
        self.alpha = arguments.fraction("alpha", alpha)
        self.gamma = arguments.not_negative("gamma", gamma)
        super().__init__(
            from_logits,
            label_smoothing,
            axis,
            reduction,
            name,
            dtype,
            focal_gamma=gamma,
            focal_alpha=alpha if apply_class_balancing else None,
        )
