"""The mean over tokens of something that is known of each token."""

import abc
import weakref
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_xent import arguments, source, statistics
from keras_xent.kernels import linear, reduction, sparse_softmax_cross_entropy, targets
from keras_xent.kernels._compile import as_written, is_eager
from keras_xent.metrics.exact_sums import ExactSums

# Of four outputs, each with and without sample weights.
_MOST_ASIDE = 8


class Totals(NamedTuple):
    """What a metric has summed up, exact to 2^48."""

    # Weighted sum of what is known of each token (nats, hits), and what it is divided by (weights, bytes).
    total: Any
    units: Any
    # Tokens that count, and labels in all, padding included.
    tokens: Any
    labels: Any


class TokenMean(keras.metrics.Metric):
    """Base of the metrics of tokens. A subclass says what is known of a token.

    What the loss of the same step has found out is used where it fits: then nothing is computed from the logits, which
    a fused head never makes. Otherwise a head is asked without making its logits, and only then the logits are read.
    """

    # Whether the metric needs the rank of the label among the classes, rather than the cross-entropy.
    needs_ranks = False
    from_logits = True
    # Tells the losses that this metric does not bring the logits back.
    finds_what_the_loss_knows = True
    logit_softcap: float | None = None

    def __init__(self, ignore_class: int | None, axis: int, name: str, dtype: Any) -> None:
        super().__init__(name=name, dtype=arguments.dtype_or_none("dtype", dtype))
        self.ignore_class = arguments.class_or_none("ignore_class", ignore_class)
        self.axis = arguments.axis(axis)
        # In the order of `Totals`.
        self._sums = ExactSums(self, "sums", len(Totals._fields))
        if keras.backend.backend() == "jax":
            shape = (_MOST_ASIDE, len(Totals._fields))
            self._aside = self.add_variable(shape, initializer="zeros", dtype="float32", name="aside")
        # Whether the updates come with weights, once there was one: Keras tries the step before JAX traces it.
        self._weighted: bool | None = None
        # The labels and weights that each row of what is aside belongs to.
        self._aside_of: list[tuple[Any, Any]] = []
        statistics.register(self)

    @abc.abstractmethod
    def _from_logits(self, labels: Any, y_pred: Any, mask: Any) -> Any:
        """The value of each token, from predictions."""

    @abc.abstractmethod
    def _from_statistics(self, known: linear.Statistics) -> Any:
        """The value of each token, from what is known of it."""

    @as_written
    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Adds the tokens of a batch: `y_true` `[...]` integers, `y_pred` `[..., C]`."""
        self._weighted = sample_weight is not None
        aside, self._aside_of = self._aside_of, []
        rows = [i for i, (label, weight) in enumerate(aside) if label() is y_true and weight() is sample_weight]
        # Of two outputs with the very same labels it is not known which is this one's.
        if len(rows) == 1:
            sums = ops.convert_to_tensor(self._aside)[rows[0]]
        else:
            with targets.called("y_true", "y_pred"):
                sums = self._summed(*self._of_batch(y_true, y_pred, sample_weight))
        self._sums.add(sums)

    @as_written
    def per_token(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tuple[Any, Any]:
        """What is known of each token of a batch, float32, and its weight: 0 where it does not count."""
        with targets.called("y_true", "y_pred"):
            values, weights, _ = self._of_batch(y_true, y_pred, sample_weight)
        return ops.where(ops.equal(weights, 0), 0.0, ops.cast(values, "float32")), weights

    def totals(self) -> Totals:
        """The sums since the last reset. Waits for the device."""
        return Totals(*map(float, self._sums.exact()))

    def take(self, left: statistics.Left) -> None:
        """Puts aside what a loss has left, for the update with the same labels and with or without its weights.

        Where it does not fit, the tokens are counted here if there is a Keras mask: outside, nothing knows of it.
        """
        for weight in (None,) if left.sample_weight is None else (None, left.sample_weight):
            wanted = self._weighted is (weight is not None)
            try:
                known = self._from_left(left, weight)
                if known is None and wanted and source.keras_mask(left.y_pred) is not None:
                    known = self._of_batch(left.y_true, left.y_pred, weight)
            except ValueError:
                # The output of another metric. If it is this one's, its own update will say what is wrong.
                known = None
            row = len(self._aside_of)
            if known is not None and row < _MOST_ASIDE:
                sums = ops.stop_gradient(self._summed(*known))[None]
                self._aside.assign(ops.slice_update(ops.convert_to_tensor(self._aside), (row, 0), sums))
                self._aside_of.append(
                    (weakref.ref(left.y_true), (lambda: None) if weight is None else weakref.ref(weight))
                )

    def is_updated_in(self, scope: Any) -> bool:
        """Whether this metric is part of the step whose variables are in a Keras scope."""
        return scope.get_current_value(self.variables[0]) is not None

    def _of_batch(self, y_true, y_pred, sample_weight):
        left = statistics.find(arguments.tensor("y_pred", y_pred))
        if left is not None and left.y_true is y_true:
            known = self._from_left(left, sample_weight)
            if known is not None:
                return known
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
        known = head.statistics(labels, counts, self.logit_softcap, ranks=self.needs_ranks)
        return self._from_statistics(known), weights, labels

    def _fits(self, left):
        return left.logit_softcap == self.logit_softcap

    def _from_left(self, left, sample_weight):
        """Values, weights and labels of the tokens from what a loss has left, or None where it does not fit."""
        known = left.statistics
        # A loss may know nothing of tokens that have no weight in it, and knows nothing of those that it ignores.
        sees_all = left.sample_weight is None or left.sample_weight is sample_weight
        if known is None or not sees_all or left.ignore_class not in (None, self.ignore_class) or not self._fits(left):
            return None
        labels = ops.reshape(targets.to_tensor(left.y_true), ops.shape(known.nll))
        valid = targets.counted(labels, known.valid, self.ignore_class)
        return self._from_statistics(known), _weights(known.nll, valid, sample_weight), labels

    def _summed(self, values, weights, labels):
        counts = ops.not_equal(weights, 0)
        values = ops.where(counts, ops.cast(values, "float32"), 0.0)
        parts = weights * values, self._units(weights, labels), ops.cast(counts, "float32")
        return ops.stack([*map(reduction.total, parts), ops.cast(ops.size(weights), "float32")])

    def _units(self, weights, labels):
        """What each token adds to the denominator."""
        return weights

    def _mean(self):
        """The mean over all tokens; nan if nothing was counted."""
        sums = Totals(*ops.unstack(self._sums.values()))
        some = ops.not_equal(sums.units, 0)
        mean = sums.total / ops.where(some, sums.units, ops.ones_like(sums.units))
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
        self._warned = False

    def _from_statistics(self, known):
        return known.nll

    def _from_logits(self, labels, y_pred, mask):
        if self.from_logits and not self._warned and source.origin(y_pred)[1] is None:
            self._warn_of_softmax(y_pred)
        logits = source.as_logits(y_pred, from_logits=self.from_logits, activation="softmax")
        return sparse_softmax_cross_entropy(labels, logits, axis=self.axis, mask=mask, logit_softcap=self.logit_softcap)

    def get_config(self) -> dict[str, Any]:
        """Every argument of the constructor."""
        names = ("from_logits", "ignore_class", "axis", "logit_softcap")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}

    def _warn_of_softmax(self, y_pred):
        if is_eager(y_pred):
            values = ops.cast(y_pred, "float32")
            sums = ops.sum(values, axis=self.axis)
            found = bool(ops.all(values >= 0)) and bool(ops.all(ops.abs(sums - 1.0) < 1e-3)) and 0 not in sums.shape
            what = "the rows of `y_pred` are probabilities: none is below 0, and they sum to 1" if found else None
        else:
            layer = source.softmax_of(source.model_of_step())
            what = layer and f"the layer '{layer}' makes probabilities of them by a softmax"
        if what:
            self._warned = True
            arguments.warn(
                f"{type(self).__name__} has from_logits=True, but {what}. Set from_logits=False, or end the model in "
                "logits."
            )


def _weights(like, valid, sample_weight):
    """The weight of each token, float32, of the shape of `like`."""
    weights = ops.ones_like(like, dtype="float32")
    if sample_weight is not None:
        sample_weight = targets.to_tensor(arguments.tensor("sample_weight", sample_weight))
        sample_weight = ops.cast(sample_weight, "float32")
        weights = weights * targets.aligned_weights(sample_weight, like.shape, like=like)
    return weights if valid is None else ops.where(valid, weights, 0.0)
