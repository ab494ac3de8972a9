"""Accuracy of the most probable token."""

import keras

from keras_xent import _keras, arguments
from keras_xent._types import DType, Tensor
from keras_xent.kernels import sparse_softmax
from keras_xent.kernels._labels import class_indices
from keras_xent.kernels._row_statistics import is_hit
from keras_xent.kernels.linear import LossStatistics
from keras_xent.metrics._token_mean import TokenMean


@keras.saving.register_keras_serializable(package="keras_xent")
class TokenAccuracy(TokenMean):
    """The share of tokens whose label is among the `top_k` largest logits, over all tokens since the last reset.

    Tokens are left out by the Keras mask and by `ignore_class`. With a fused head the loss ranks the labels too,
    without storing the logits, which Keras' `"accuracy"` would need.

    Formula: `sum_n t_n [r_n < top_k] / sum_n t_n` over valid tokens `n` with sample weights `t_n`, where `r_n` is the
    rank of the label: the number of classes with larger logits, or equal ones of a smaller index. Without a valid
    token: nan.

    Equivalent to `mean(argmax(y_pred, axis=-1) == y_true)` over one batch that holds every token and no padding.

    Args:
        ignore_class: the label of padding.
        axis: the class axis.
        name: name of the metric; by default `"token_accuracy"`, or `"top_5_token_accuracy"` and so on.
        dtype: dtype of the result (default float32).
        top_k: how many predictions a label may be among.

    Raises:
        ValueError: a `top_k` that is not a whole number of at least 1; in eager mode, a label out of range.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> metric = kx.metrics.TokenAccuracy(ignore_class=-1)
    >>> metric.update_state(np.array([[0, 1, -1]]), np.array([[[0.1, 2.0], [0.5, 0.7], [1.0, 0.0]]]))
    >>> float(metric.result())
    0.5

    References: `return_token_accuracy` of the Liger Kernel, which counts in the same place.
    """

    # A cap keeps the order of the logits, and so does a softmax.
    _depends_on_logits = False

    def __init__(
        self,
        ignore_class: int | None = None,
        axis: int = -1,
        name: str | None = None,
        dtype: DType = None,
        *,
        top_k: int = 1,
    ) -> None:
        top_k = arguments.count("top_k", top_k)
        name = name or ("token_accuracy" if top_k == 1 else f"top_{top_k}_token_accuracy")
        super().__init__(ignore_class, axis, name, dtype)
        self.top_k = top_k
        self.needs_statistics = frozenset({"hit" if top_k == 1 else "rank"})
        _keras.set_direction(self, "up")

    def _values_from_predictions(self, labels: Tensor, y_pred: Tensor, mask: Tensor) -> Tensor:
        labels = class_indices(labels, y_pred.shape[self.axis], mask)
        return is_hit(sparse_softmax.label_ranks(labels, y_pred, axis=self.axis), self.top_k)

    def _values_from_statistics(self, statistics: LossStatistics) -> Tensor:
        # Where no error can be raised, a label out of range makes the accuracy NaN.
        return statistics.hit if self.top_k == 1 else is_hit(statistics.rank, self.top_k)
