"""How often the most probable token is the right one."""

from typing import Any

import keras
from keras import ops

from keras_xent import arguments
from keras_xent.kernels import sparse_softmax, targets
from keras_xent.metrics.token_mean import TokenMean


@keras.saving.register_keras_serializable(package="keras_xent")
class TokenAccuracy(TokenMean):
    """The share of tokens whose label is among the `top_k` largest logits, over all tokens since the last reset.

    Counts tokens as `Perplexity` does: masks, `ignore_class` and sample weights. With a fused head the labels are
    ranked where the loss is computed, and no logits are made for it; Keras' `"accuracy"` would make them.

    Formula: `sum_n t_n [r_n < top_k] / sum_n t_n` over valid tokens `n` with sample weights `t_n`, where `r_n` classes
    are predicted before the label: those with larger logits, and with equal ones those that come first, as in `argmax`.
    Nothing counted: nan.

    Equivalent to `mean(argmax(y_pred, axis=-1) == y_true)` over one batch that holds every token and no padding.

    Args:
        ignore_class: the label of padding.
        axis: the class axis.
        name: name of the metric; by default `"token_accuracy"`, or `"top_5_token_accuracy"` and so on.
        dtype: dtype of the result (default float32).
        top_k: how many predictions a label may be among.

    Raises:
        ValueError: a `top_k` that is no whole number of at least 1; in eager mode, a label that is no class.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> metric = kx.metrics.TokenAccuracy(ignore_class=-1)
    >>> metric.update_state(np.array([[0, 1, -1]]), np.array([[[0.1, 2.0], [0.5, 0.7], [1.0, 0.0]]]))
    >>> float(metric.result())
    0.5

    References: `return_token_accuracy` of the Liger Kernel, which counts in the same place.
    """

    needs_ranks = True

    def __init__(
        self,
        ignore_class: int | None = None,
        axis: int = -1,
        name: str | None = None,
        dtype: Any = None,
        *,
        top_k: int = 1,
    ) -> None:
        top_k = arguments.count("top_k", top_k)
        name = name or ("token_accuracy" if top_k == 1 else f"top_{top_k}_token_accuracy")
        super().__init__(ignore_class, axis, name, dtype)
        self.top_k = top_k
        self._direction = "up"

    def _fits(self, left):
        # A cap keeps the order of the logits.
        return left.statistics.rank is not None

    def _from_logits(self, labels, y_pred, mask):
        labels = targets.class_indices(labels, y_pred.shape[self.axis], mask)
        return self._hits(sparse_softmax.label_ranks(labels, y_pred, axis=self.axis))

    def _from_statistics(self, known):
        return self._hits(known.rank)

    def _hits(self, rank):
        # Where nobody can raise, a label that is no class makes the accuracy NaN.
        return ops.where(ops.isnan(rank), rank, ops.cast(rank < self.top_k, rank.dtype))

    def result(self) -> Any:
        """The accuracy; nan if nothing was counted."""
        return ops.cast(self._mean(), self.dtype)

    def get_config(self) -> dict[str, Any]:
        """Every argument of the constructor."""
        return {**super().get_config(), "ignore_class": self.ignore_class, "axis": self.axis, "top_k": self.top_k}
