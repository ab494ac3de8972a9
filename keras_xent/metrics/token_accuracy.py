"""How often the most probable token is the right one."""

from typing import Any

import keras
from keras import ops

from keras_xent import statistics
from keras_xent.metrics.token_mean import TokenMean


@keras.saving.register_keras_serializable(package="keras_xent")
class TokenAccuracy(TokenMean):
    """The share of tokens whose label has the largest logit, over all tokens since the last reset.

    Counts tokens as `Perplexity` does: masks, `ignore_class` and sample weights. With a fused head the hits are counted
    where the loss is computed, and no logits are made for it; Keras' `"accuracy"` would make them.

    Formula: `sum_n t_n [argmax_c x_nc = k_n] / sum_n t_n` over valid tokens `n` with labels `k_n` and sample weights
    `t_n`. Of several largest logits the first counts, as in `argmax`. Nothing counted: nan.

    Equivalent to `mean(argmax(y_pred, axis=-1) == y_true)` over one batch that holds every token and no padding.

    Args:
        ignore_class: the label of padding.
        axis: the class axis.
        name: name of the metric.
        dtype: dtype of the result (default float32).

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> metric = kx.metrics.TokenAccuracy(ignore_class=-1)
    >>> metric.update_state(np.array([[0, 1, -1]]), np.array([[[0.1, 2.0], [0.5, 0.7], [1.0, 0.0]]]))
    >>> float(metric.result())
    0.5

    References: `return_token_accuracy` of the Liger Kernel, which counts in the same place.
    """

    needs_hits = True

    def __init__(
        self,
        ignore_class: int | None = None,
        axis: int = -1,
        name: str = "token_accuracy",
        dtype: Any = None,
    ) -> None:
        super().__init__(ignore_class, axis, name, dtype)
        self._direction = "up"

    def _fits(self, left):
        # A cap keeps the order of the logits.
        return left.statistics.hits is not None and left.ignore_class == self.ignore_class

    def _from_logits(self, labels, y_pred, mask):
        return statistics.greedy_hits(labels, y_pred, self.axis)

    def result(self) -> Any:
        """The accuracy; nan if nothing was counted."""
        return ops.cast(self._mean(), self.dtype)

    def get_config(self) -> dict[str, Any]:
        """Every argument of the constructor."""
        return {**super().get_config(), "ignore_class": self.ignore_class, "axis": self.axis}
