"""Mean entropy of the predicted distributions."""

import keras
from keras import ops

from keras_xent._types import DType, Tensor
from keras_xent.kernels._row_statistics import dense_statistics
from keras_xent.kernels.linear import LossStatistics
from keras_xent.metrics._token_mean import TokenMean


@keras.saving.register_keras_serializable(package="keras_xent")
class Entropy(TokenMean):
    """The mean entropy in nats of the predicted distributions, over all tokens since the last reset.

    The uncertainty of a model, whatever the labels: it falls towards 0 where a policy collapses. A model whose entropy
    is below its cross-entropy is overconfident, above it underconfident. Tokens are left out by the Keras mask and by
    `ignore_class`. With a fused head the loss computes the entropy too, without storing the logits.

    Formula: `sum_n t_n H_n / sum_n t_n` over valid tokens `n` with sample weights `t_n`, `H = -sum_c p_c log p_c`.
    Without a valid token: nan.

    Args:
        from_logits: whether `y_pred` holds logits or probabilities.
        ignore_class: the label of padding.
        axis: the class axis.
        name: name of the metric.
        dtype: dtype of the result (default float32).
        logit_softcap: the loss's `logit_softcap`, if it has one.

    Raises:
        ValueError: shapes that do not fit.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> metric = kx.metrics.Entropy(ignore_class=-1)
    >>> metric.update_state(np.array([[0, -1]]), np.array([[[1.0, 1.0], [5.0, 0.0]]]))
    >>> round(float(metric.result()), 4)  # ln 2
    0.6931

    References: entropy as a measure of exploration, arXiv:1602.01783, section 4.
    """

    needs_statistics = frozenset({"entropy"})

    def __init__(
        self,
        from_logits: bool = True,
        ignore_class: int | None = None,
        axis: int = -1,
        name: str = "entropy",
        dtype: DType = None,
        *,
        logit_softcap: float | None = None,
    ) -> None:
        super().__init__(ignore_class, axis, name, dtype, from_logits=from_logits, logit_softcap=logit_softcap)

    def _values_from_statistics(self, statistics: LossStatistics) -> Tensor:
        return statistics.entropy

    def _values_from_predictions(self, labels: Tensor, y_pred: Tensor, mask: Tensor) -> Tensor:
        logits = self._logits(y_pred, is_clipped=False)
        any_class = ops.zeros_like(labels, dtype="int32")
        (entropy,) = dense_statistics(any_class, logits, ("entropy",), axis=self.axis, softcap=self.logit_softcap)
        return entropy
