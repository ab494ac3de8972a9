"""Perplexity of what a language model predicts."""

import keras
from keras import ops

from keras_xent._backend import no_autograph
from keras_xent._types import Tensor
from keras_xent.metrics.token_crossentropy import TokenCrossentropy


@keras.saving.register_keras_serializable(package="keras_xent")
class Perplexity(TokenCrossentropy):
    """The exponential of the mean cross-entropy per token, over all tokens since the last reset.

    Every valid token counts the same, however the batches were cut. Give it in `compile(weighted_metrics=[...])` if
    sample weights mark padding, in `metrics=[...]` otherwise; a Keras mask and `ignore_class` count in both. Label
    smoothing and class weights of the loss are left out: perplexity is a property of the model's probabilities.

    Formula: `exp(sum_n t_n nll_n / sum_n t_n)` over valid tokens `n` with sample weights `t_n`. The exponential is
    taken in `result()` only; past 88 nats it is inf in float32, and `nll()` still has the mean. Without a valid token:
    nan.

    Equivalent to `exp(keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y_true, y_pred))` over one batch
    that holds every token and no padding.

    Args:
        from_logits: whether `y_pred` holds logits or probabilities.
        ignore_class: the label of padding.
        axis: the class axis.
        name: name of the metric (default `"perplexity"`).
        dtype: dtype of the result (default float32). The sums are exact to 2^48 tokens whatever it is.
        logit_softcap: the loss's `logit_softcap`, if it has one.

    Raises:
        ValueError: shapes that do not fit; in eager mode, a label out of range.

    Warns once where logits are expected and probabilities are received.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> metric = kx.metrics.Perplexity(ignore_class=-1)
    >>> logits = np.log([[[0.25, 0.75], [0.5, 0.5]]])
    >>> metric.update_state(np.array([[0, -1]]), logits)
    >>> round(float(metric.result()), 4)
    4.0

    References: `exp` of equation (1) of arXiv:2203.15556 and of the cross-entropy in nats everywhere.
    """

    _default_name = "perplexity"

    def nll(self) -> Tensor:
        """Mean negative log-likelihood per token, in nats; nan without a valid token."""
        return self._mean()

    @no_autograph
    def result(self) -> Tensor:
        """The perplexity; nan without a valid token."""
        return ops.cast(ops.exp(self.nll()), self.dtype)
