"""The mean over tokens of something that is known of each token."""

import abc
import weakref
from typing import Any

import keras
from keras import ops

from keras_xent import arguments, source, statistics
from keras_xent.kernels import linear, sparse_softmax_cross_entropy, targets
from keras_xent.kernels._compile import as_written
from keras_xent.metrics.exact_sum import ExactSum


class TokenMean(keras.metrics.Metric):
    """Base of the metrics of tokens. A subclass says what is known of a token.

    What the loss of the same step has found out is used where it fits: then nothing is computed from the logits, which
    a fused head never makes. Otherwise a head is asked without making its logits, and only then the logits are read.
    """

    # Whether the metric needs to know if the greedy prediction was right, rather than the cross-entropy.
    needs_hits = False
    from_logits = True
    # Tells the losses that this metric does not bring the logits back.
    finds_what_the_loss_knows = True
    logit_softcap: float | None = None

    def __init__(self, ignore_class: int | None, axis: int, name: str, dtype: Any) -> None:
        super().__init__(name=name, dtype=arguments.dtype_or_none("dtype", dtype))
        self.ignore_class = arguments.class_or_none("ignore_class", ignore_class)
        self.axis = arguments.axis(axis)
        self._total = ExactSum(self, "total")
        self._tokens = ExactSum(self, "tokens")
        if keras.backend.backend() == "jax":
            self._aside_total = self.add_variable((), initializer="zeros", dtype="float32", name="aside_total")
            self._aside_tokens = self.add_variable((), initializer="zeros", dtype="float32", name="aside_tokens")
        # The labels and weights that what is aside belongs to.
        self._aside_of: tuple[Any, Any] | None = None
        statistics.register(self)

    @abc.abstractmethod
    def _from_logits(self, labels: Any, y_pred: Any, mask: Any) -> Any:
        """The value of each token, from predictions."""

    @as_written
    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Adds the tokens of a batch: `y_true` `[...]` integers, `y_pred` `[..., C]`."""
        aside, self._aside_of = self._aside_of, None
        if aside is not None and aside[0]() is y_true and aside[1]() is sample_weight:
            total, tokens = ops.convert_to_tensor(self._aside_total), ops.convert_to_tensor(self._aside_tokens)
        else:
            with targets.called("y_true", "y_pred"):
                total, tokens = self._sums(*self._of_batch(y_true, y_pred, sample_weight))
        self._total.add(total)
        self._tokens.add(tokens)

    def take(self, left: statistics.Left) -> None:
        """Puts aside what a loss has left, for the update with the same labels and weights."""
        if not self._fits(left):
            return
        total, tokens = self._sums(*self._of_statistics(left, left.sample_weight))
        self._aside_total.assign(ops.stop_gradient(total))
        self._aside_tokens.assign(ops.stop_gradient(tokens))
        nothing = lambda: None  # noqa: E731
        weight = left.sample_weight
        self._aside_of = (weakref.ref(left.y_true), nothing if weight is None else weakref.ref(weight))

    def _of_batch(self, y_true, y_pred, sample_weight):
        left = statistics.find(arguments.tensor("y_pred", y_pred))
        if left is not None and left.y_true is y_true and self._fits(left):
            if left.sample_weight is None or left.sample_weight is sample_weight:
                return self._of_statistics(left, sample_weight)
        labels = targets.to_tensor(arguments.tensor("y_true", y_true))
        axis = targets.checked_axis(self.axis, len(y_pred.shape), "predictions")
        logits = source.fusible_logits(y_pred, axis=axis, from_logits=self.from_logits)
        head = None if logits is None else source.head_of(logits)
        labels = targets.without_class_axis(labels, y_pred, axis, hidden=head and head.hidden)
        valid, mask = targets.counted(labels, None, self.ignore_class), source.keras_mask(y_pred)
        if mask is not None:
            mask = targets.aligned_weights(ops.cast(mask, "bool"), labels.shape, "mask", like=labels)
            valid = mask if valid is None else ops.logical_and(valid, mask)
        weights = _weights(labels, valid, sample_weight)
        counts = ops.not_equal(weights, 0)
        if head is None:
            return self._from_logits(labels, y_pred, counts), weights, labels
        _, known = linear.with_statistics(
            head.hidden,
            head.kernel,
            labels,
            head.bias,
            transpose_kernel=head.transpose_kernel,
            mask=counts,
            logit_softcap=head.logit_softcap or self.logit_softcap,
            hits=self.needs_hits,
        )
        return self._known(known), weights, labels

    def _fits(self, left):
        return left.ignore_class == self.ignore_class and left.logit_softcap == self.logit_softcap

    def _of_statistics(self, left, sample_weight):
        known = left.statistics
        labels = ops.reshape(targets.to_tensor(left.y_true), ops.shape(known.nll))
        return self._known(known), _weights(known.nll, known.valid, sample_weight), labels

    def _known(self, known):
        return known.hits if self.needs_hits else known.nll

    def _sums(self, values, weights, labels):
        values = ops.where(ops.equal(weights, 0), 0.0, ops.cast(values, "float32"))
        return ops.sum(weights * values), ops.sum(self._units(weights, labels))

    def _units(self, weights, labels):
        """What each token adds to the denominator."""
        return weights

    def _mean(self):
        """The mean over all tokens; nan if nothing was counted."""
        tokens = self._tokens.value()
        some = ops.not_equal(tokens, 0)
        mean = self._total.value() / ops.where(some, tokens, ops.ones_like(tokens))
        return ops.where(some, mean, ops.full_like(mean, float("nan")))


class LogLikelihoodMean(TokenMean):
    """Base of the metrics of the tokens' cross-entropy."""

    def __init__(
        self,
        from_logits: bool,
        ignore_class: int | None,
        axis: int,
        name: str,
        dtype: Any,
        logit_softcap: float | None,
    ) -> None:
        super().__init__(ignore_class, axis, name, dtype)
        self.from_logits = arguments.boolean("from_logits", from_logits)
        self.logit_softcap = arguments.positive("logit_softcap", logit_softcap)
        # Lets EarlyStopping and ModelCheckpoint know that less is better.
        self._direction = "down"

    def _from_logits(self, labels, y_pred, mask):
        logits = source.as_logits(y_pred, from_logits=self.from_logits, activation="softmax")
        return sparse_softmax_cross_entropy(labels, logits, axis=self.axis, mask=mask, logit_softcap=self.logit_softcap)

    def get_config(self) -> dict[str, Any]:
        """Every argument of the constructor."""
        names = ("from_logits", "ignore_class", "axis", "logit_softcap")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def _weights(like, valid, sample_weight):
    """The weight of each token, float32, of the shape of `like`."""
    weights = ops.ones_like(like, dtype="float32")
    if sample_weight is not None:
        sample_weight = targets.to_tensor(arguments.tensor("sample_weight", sample_weight))
        sample_weight = ops.cast(sample_weight, "float32")
        weights = weights * targets.aligned_weights(sample_weight, like.shape, like=like)
    return weights if valid is None else ops.where(valid, weights, 0.0)
