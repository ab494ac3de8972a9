"""Divergence of predicted distributions from target ones."""

import keras
from keras import ops

from keras_xent import provenance
from keras_xent._types import DType, Reduction, Tensor
from keras_xent.kernels._dtypes import upcast
from keras_xent.kernels._masking import both, where_or_zero
from keras_xent.kernels._shapes import same_shape
from keras_xent.losses.base import Alignment, Crossentropy, Unreduced


@keras.saving.register_keras_serializable(package="keras_xent")
class KLDivergence(Crossentropy):
    """Kullback-Leibler divergence of predicted probabilities from target probabilities.

    For soft labels, such as those of several annotators. Unlike `CategoricalCrossentropy`, it is 0 where the prediction
    equals the target. A drop-in for `keras.losses.KLDivergence`: same arguments, defaults and values. Where the logits
    before a softmax are known, they are used, and nothing is clipped.

    Formula: `sum_c y_c log (y_c / p_c)`, where probabilities below `keras.config.epsilon()` are raised to it, as in
    Keras. The gradient is `-y / p` with the raised `p`, also where Keras has 0.

    Args:
        reduction: `"sum_over_batch_size"`, `"mean"`, `"mean_with_sample_weight"`, `"sum"`, `"none"`,
            `"token_mean"` (the weighted mean over valid examples on all replicas) or
            `"sequence_mean"` (the mean over examples of each one's mean).
        name: name of the loss.
        dtype: dtype of the result (default float32).

    Call arguments: `y_true`, `y_pred` `[..., C]` probabilities, `sample_weight` a scalar, `[B]`, `[B, 1]` or `[...]`.

    Raises:
        ValueError: shapes that do not fit.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> y_true, y_pred = np.array([[0.5, 0.5]], "float32"), np.array([[0.25, 0.75]], "float32")
    >>> round(float(kx.losses.KLDivergence()(y_true, y_pred)), 4)
    0.1438

    In a model:

    >>> import keras
    >>> model = keras.Sequential([keras.layers.Dense(3, "softmax")])
    >>> model.compile("adam", kx.losses.KLDivergence())

    References: `keras.losses.KLDivergence`.
    """

    def __init__(
        self,
        reduction: Reduction | None = "sum_over_batch_size",
        name: str | None = "kl_divergence",
        dtype: DType = None,
    ) -> None:
        super().__init__(from_logits=False, reduction=reduction, name=name, dtype=dtype)

    def _logits(self, y_pred: Tensor) -> Tensor:
        """The logarithms of the probabilities: unlike logits, they are not made to sum to 1, as in Keras."""
        activation, logits = provenance.activation_and_logits(y_pred)
        if activation != "softmax":
            bare = super()._logits(y_pred)
            return ops.minimum(bare, ops.zeros((), bare.dtype))
        logits = ops.cast(logits, "float64") if self.dtype == "float64" else upcast(logits)
        # NaN under a mask must not leave its row: the derivative of a softmax would spread it.
        is_number = ops.all(ops.logical_not(ops.isnan(logits)), axis=-1, keepdims=True)
        log_p = ops.log_softmax(where_or_zero(logits, is_number))
        return ops.where(is_number, log_p, ops.full((), float("nan"), log_p.dtype))

    def _unreduced(self, y_true: Tensor, logits: Tensor, aligned: Alignment) -> Unreduced:
        if not same_shape(y_true.shape, logits.shape):
            raise ValueError(
                "`y_true` and `y_pred` must have the same shape, a distribution over the classes each. Received: "
                f"y_true of shape {tuple(y_true.shape)} and y_pred of shape {tuple(logits.shape)}."
            )
        y = ops.cast(y_true, logits.dtype)
        counted = both(aligned.valid, aligned.nonzero_weight)
        if counted is not None:
            # The gradient is y times that of the loss, and NaN times the 0 of a row that does not count is NaN.
            y = where_or_zero(y, ops.logical_or(ops.expand_dims(counted, -1), ops.logical_not(ops.isnan(y))))
        # A class without probability costs nothing, whatever was predicted for it.
        is_counted = ops.logical_or(y > 0, ops.logical_not(ops.equal(logits, -float("inf"))))
        y = ops.clip(y, keras.config.epsilon(), 1.0)
        terms = y * (ops.log(y) - where_or_zero(logits, is_counted))
        return Unreduced(ops.sum(where_or_zero(terms, is_counted), axis=-1))
