"""Perplexity of what a language model predicts."""

from typing import Any

import keras
from keras import ops

from keras_xent import arguments, source
from keras_xent.kernels import sparse_softmax_cross_entropy, targets
from keras_xent.kernels._compile import as_written
from keras_xent.metrics.exact_sum import ExactSum


@keras.saving.register_keras_serializable(package="keras_xent")
class Perplexity(keras.metrics.Metric):
    """The exponential of the mean cross-entropy per token, over all tokens since the last reset.

    Every valid token counts the same, however the batches were cut. Give it in `compile(weighted_metrics=[...])` if
    sample weights mark padding, in `metrics=[...]` otherwise; a Keras mask and `ignore_class` count in both. Label
    smoothing and class weights of the loss are left out: perplexity is a property of the model's probabilities.

    Formula: `exp(sum_n t_n nll_n / sum_n t_n)` over valid tokens `n` with sample weights `t_n`. The exponential is
    taken in `result()` only; past 88 nats it is inf in float32, and `nll()` still says the mean. Nothing counted: nan.

    Equivalent to `exp(keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y_true, y_pred))` over one batch
    that holds every token and no padding.

    Args:
        from_logits: whether `y_pred` holds logits or probabilities.
        ignore_class: the label of padding.
        axis: the class axis.
        name: name of the metric.
        dtype: dtype of the result (default float32). The sums are exact to 2^48 tokens whatever it is.
        logit_softcap: the loss's `logit_softcap`, if it has one.

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

    def __init__(
        self,
        from_logits: bool = True,
        ignore_class: int | None = None,
        axis: int = -1,
        name: str = "perplexity",
        dtype: Any = None,
        *,
        logit_softcap: float | None = None,
    ) -> None:
        super().__init__(name=name, dtype=arguments.dtype_or_none("dtype", dtype))
        self.from_logits = arguments.boolean("from_logits", from_logits)
        self.ignore_class = arguments.class_or_none("ignore_class", ignore_class)
        self.axis = arguments.axis(axis)
        self.logit_softcap = arguments.positive("logit_softcap", logit_softcap)
        self._nll = ExactSum(self, "nll")
        self._tokens = ExactSum(self, "tokens")
        # Lets EarlyStopping and ModelCheckpoint know that less is better.
        self._direction = "down"

    @as_written
    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Adds the tokens of a batch: `y_true` `[...]` integers, `y_pred` `[..., C]`."""
        with targets.called("y_true", "y_pred"):
            self._add(y_true, y_pred, sample_weight)

    def _add(self, y_true, y_pred, sample_weight):
        mask = source.keras_mask(y_pred)
        y_pred = arguments.tensor("y_pred", y_pred)
        logits = source.as_logits(y_pred, from_logits=self.from_logits, activation="softmax")
        labels = targets.to_tensor(arguments.tensor("y_true", y_true))
        labels = targets.without_class_axis(labels, logits, targets.checked_axis(self.axis, len(logits.shape)))
        shape = labels.shape
        valid = targets.counted(labels, None, self.ignore_class)
        if mask is not None:
            mask = targets.aligned_weights(ops.cast(mask, "bool"), shape, "mask")
            valid = mask if valid is None else ops.logical_and(valid, mask)
        weights = ops.ones(ops.shape(labels), dtype="float32")
        if sample_weight is not None:
            sample_weight = targets.to_tensor(arguments.tensor("sample_weight", sample_weight))
            sample_weight = ops.cast(sample_weight, "float32")
            weights = weights * targets.aligned_weights(sample_weight, shape)
        if valid is not None:
            weights = ops.where(valid, weights, 0.0)
        nll = sparse_softmax_cross_entropy(
            labels, logits, axis=self.axis, mask=ops.not_equal(weights, 0), logit_softcap=self.logit_softcap
        )
        self._nll.add(ops.sum(weights * ops.cast(nll, "float32")))
        self._tokens.add(ops.sum(weights))

    def nll(self) -> Any:
        """Mean negative log-likelihood per token, in nats; nan if nothing was counted."""
        tokens = self._tokens.value()
        some = ops.not_equal(tokens, 0)
        mean = self._nll.value() / ops.where(some, tokens, ops.ones_like(tokens))
        return ops.where(some, mean, ops.full_like(mean, float("nan")))

    @as_written
    def result(self) -> Any:
        """The perplexity; nan if nothing was counted."""
        return ops.cast(ops.exp(self.nll()), self.dtype)

    def get_config(self) -> dict[str, Any]:
        """Every argument of the constructor."""
        names = ("from_logits", "ignore_class", "axis", "logit_softcap")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
