"""Mean cross-entropy per token."""

import keras

from keras_xent import _keras
from keras_xent._types import DType, Tensor
from keras_xent.kernels import sparse_softmax_cross_entropy
from keras_xent.kernels.linear import LossStatistics
from keras_xent.metrics._token_mean import TokenMean


@keras.saving.register_keras_serializable(package="keras_xent")
class TokenCrossentropy(TokenMean):
    """The mean cross-entropy per token in nats, over all tokens since the last reset: the logarithm of `Perplexity`.

    With `name="loss"` it replaces what Keras calls `loss` and `val_loss`, the mean of the batches' losses weighted by
    their rows: the number of an epoch is then the token mean that `MaskedSequenceCrossentropy` trains on. Label
    smoothing, class weights and z-loss of the loss are left out.

    Formula: `sum_n t_n nll_n / sum_n t_n` over valid tokens `n` with sample weights `t_n`. Without a valid token: nan.

    Equivalent to `keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y_true, y_pred)` over one batch that
    holds every token and no padding.

    Args:
        from_logits: whether `y_pred` holds logits or probabilities.
        ignore_class: the label of padding.
        axis: the class axis.
        name: name of the metric (default `"token_crossentropy"`).
        dtype: dtype of the result (default float32). The sums are exact to 2^48 tokens whatever it is.
        logit_softcap: the loss's `logit_softcap`, if it has one.

    Raises:
        ValueError: shapes that do not fit; in eager mode, a label out of range.

    Warns once where logits are expected and probabilities are received.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> metric = kx.metrics.TokenCrossentropy(ignore_class=-1)
    >>> logits = np.log([[[0.25, 0.75], [0.5, 0.5]]])
    >>> metric.update_state(np.array([[0, -1]]), logits)
    >>> round(float(metric.result()), 4)  # -ln 0.25
    1.3863

    References: cross-entropy per token, arXiv:2203.15556, equation (1).
    """

    _default_name = "token_crossentropy"

    def __init__(
        self,
        from_logits: bool = True,
        ignore_class: int | None = None,
        axis: int = -1,
        name: str | None = None,
        dtype: DType = None,
        *,
        logit_softcap: float | None = None,
    ) -> None:
        name = name or self._default_name
        super().__init__(ignore_class, axis, name, dtype, from_logits=from_logits, logit_softcap=logit_softcap)
        # Lets EarlyStopping and ModelCheckpoint know that less is better.
        _keras.set_direction(self, "down")

    def _values_from_statistics(self, statistics: LossStatistics) -> Tensor:
        return statistics.nll

    def _values_from_predictions(self, labels: Tensor, y_pred: Tensor, mask: Tensor) -> Tensor:
        logits = self._logits(y_pred)
        return sparse_softmax_cross_entropy(labels, logits, axis=self.axis, mask=mask, logit_softcap=self.logit_softcap)
