"""The mean over tokens of a value of each token."""

import abc
import weakref
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_xent import _endings, _keras, _loss_statistics, _words, arguments, provenance
from keras_xent._backend import is_eager, no_autograph
from keras_xent._named_arguments import NamedArguments
from keras_xent._types import DType, Tensor
from keras_xent.kernels import reduction
from keras_xent.kernels._dtypes import to_tensor
from keras_xent.kernels._labels import valid_mask
from keras_xent.kernels._masking import both
from keras_xent.kernels._shapes import align_weights, checked_axis, squeeze_class_axis
from keras_xent.kernels.linear import LossStatistics
from keras_xent.metrics._exact_sums import ExactSums


class Totals(NamedTuple):
    """The sums of a metric, exact to 2^48."""

    # Weighted sum of the tokens' values (nats, hits), and its denominator (weights, bytes).
    total: Any
    denominator: Any
    # Valid tokens, and labels in all, padding included.
    tokens: Any
    labels: Any


class TokenValues(NamedTuple):
    """The value of each token of a batch, its weight (0 where it is not valid), and its label."""

    values: Tensor
    weights: Tensor
    labels: Tensor


class TokenMean(NamedArguments, keras.metrics.Metric):
    """Base of the metrics of tokens. A subclass computes the value of a token.

    The statistics of the loss of the same step are used where they fit: then nothing is computed from the logits, which
    a fused head never materializes. Otherwise the head computes the value without them, and only where there is no head
    the logits are read.
    """

    # The names of the statistics that the metric needs beside the cross-entropy.
    needs_statistics: frozenset[str] = frozenset()
    # Tells the losses that this metric does not make a step materialize the logits.
    reuses_loss_statistics = True
    # The first are in the order of `Totals`.
    _num_sums = len(Totals._fields)
    # False for what is the same of logits and of probabilities, capped or not: their order.
    _depends_on_logits = True

    def __init__(
        self,
        ignore_class: int | None,
        axis: int,
        name: str,
        dtype: DType,
        *,
        from_logits: bool = True,
        logit_softcap: float | None = None,
    ) -> None:
        self._given_dtype = arguments.dtype_or_none("dtype", dtype)
        super().__init__(name=name, dtype=self._given_dtype)
        self.ignore_class = arguments.class_or_none("ignore_class", ignore_class)
        self.axis = arguments.axis(axis)
        self.from_logits = arguments.boolean("from_logits", from_logits)
        self.logit_softcap = arguments.positive("logit_softcap", logit_softcap)
        self._sums = ExactSums(self, "sums", self._num_sums)
        self._mailbox = _loss_statistics.Mailbox(self, self._num_sums)
        # Whether an update had weights: Keras runs the step symbolically before JAX traces it. A validation has perhaps
        # none.
        self._is_weighted: bool | None = None
        # On JAX: labels of a loss that means something else, and what it means.
        self._disagreements: list[tuple[Any, str | None]] = []
        self._warned = set()
        _loss_statistics.register(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Updates the state, and returns the result so far."""
        if _keras.is_given_as_loss(self):
            raise TypeError(
                f"{type(self).__name__} is a metric and has no gradient, and it was given as a loss. Give it to "
                "`compile(metrics=[...])`, and a loss such as keras_xent.losses.MaskedSequenceCrossentropy to `loss=`."
            )
        return super().__call__(*args, **kwargs)

    @abc.abstractmethod
    def _values_from_predictions(self, labels: Tensor, y_pred: Tensor, mask: Tensor) -> Tensor:
        """The value of each token, from predictions."""

    @abc.abstractmethod
    def _values_from_statistics(self, statistics: LossStatistics) -> Tensor:
        """The value of each token, from the statistics of a loss or a head."""

    @no_autograph
    def update_state(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor = None) -> None:
        """Adds the tokens of a batch: `y_true` `[...]` integers, `y_pred` `[..., C]`."""
        y_pred = provenance.read_variable(y_pred)
        self._is_weighted = bool(self._is_weighted) or sample_weight is not None
        sums = self._mailbox.take(y_true, sample_weight)
        told = [message for labels, message in self._disagreements if labels() is y_true]
        self._disagreements = []
        # Of two outputs with the very same labels it is not known which is this one's.
        if len(told) == 1:
            self._warn_once("disagreement", told[0])
        if sums is None:
            self._warn_of_lost_mask(y_pred)
            with _words.named("y_true", "y_pred", one_hot=_words.GIVE_INDICES):
                sums = self._sum(self._token_values(y_true, y_pred, sample_weight))
        self._sums.add(sums)

    @no_autograph
    def per_token(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor = None) -> tuple[Tensor, Tensor]:
        """The value of each token of a batch, float32, and its weight: 0 where it is not valid."""
        y_pred = provenance.read_variable(y_pred)
        with _words.named("y_true", "y_pred", one_hot=_words.GIVE_INDICES):
            values, weights, _ = self._token_values(y_true, y_pred, sample_weight)
        return ops.where(ops.equal(weights, 0), 0.0, ops.cast(values, "float32")), weights

    def totals(self) -> Totals:
        """The sums since the last reset. Waits for the device."""
        return Totals(*map(float, self._sums.exact()[: len(Totals._fields)]))

    def receive(self, record: _loss_statistics.LossRecord) -> None:
        """Keeps the sums of a loss's record, for the update with the same labels, with or without its weights.

        Where it does not fit, the tokens are summed up here if there is a Keras mask, which is lost outside the
        gradient.
        """
        for weight in (None,) if record.sample_weight is None else (None, record.sample_weight):
            is_expected = self._is_weighted is (weight is not None)
            try:
                tokens = self._from_record(record, weight)
                if tokens is None and is_expected and _keras.mask_of(record.y_pred) is not None:
                    tokens = self._token_values(record.y_true, record.y_pred, weight)
                sums = None if tokens is None else self._sum(tokens)
            except ValueError:
                # The output of another metric. If it is this one's, its own update raises the same error.
                continue
            if sums is not None:
                self._mailbox.put(record.y_true, weight, sums)
        # Whether this output is the metric's will be known in its update.
        weight = record.sample_weight if self._is_weighted else None
        self._disagreements.append((weakref.ref(record.y_true), self._disagreement(record, record.y_pred, weight)))

    def is_updated_in(self, scope: Any) -> bool:
        """Returns whether this metric is part of the step whose variables are in a stateless scope of Keras."""
        return scope.get_current_value(self.variables[0]) is not None

    def _token_values(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor) -> TokenValues:
        record = _loss_statistics.lookup(y_true, arguments.tensor("y_pred", y_pred))
        if record is not None:
            self._warn_once("disagreement", self._disagreement(record, y_pred, sample_weight))
            if (tokens := self._from_record(record._replace(y_pred=y_pred), sample_weight)) is not None:
                return tokens
        labels = to_tensor(y_true, "y_true")
        axis = checked_axis(self.axis, len(y_pred.shape), "predictions")
        logits = provenance.fusible_logits(y_pred, axis=axis, from_logits=self.from_logits)
        head = None if logits is None else provenance.head_of(logits)
        if head is not None and head.logit_softcap and self.logit_softcap:
            # Two caps, one after the other, are not one cap.
            head = None
        labels = squeeze_class_axis(labels, y_pred, axis, hidden=head and head.hidden)
        weights = self._weights_of(labels, y_pred, sample_weight)
        is_active = ops.not_equal(weights, 0)
        if head is None:
            return TokenValues(self._values_from_predictions(labels, y_pred, is_active), weights, labels)
        statistics = head.statistics(labels, is_active, self.logit_softcap, self.needs_statistics)
        return TokenValues(self._values_from_statistics(statistics), weights, labels)

    def _weights_of(self, labels: Tensor, y_pred: Tensor, sample_weight: Tensor) -> Tensor:
        """The weight of each label, float32: 0 for those of `ignore_class` or left out by the Keras mask."""
        mask = align_weights(_keras.mask_of(y_pred), labels.shape, "mask", like=labels)
        return _weights(labels, both(valid_mask(labels, None, self.ignore_class), mask), sample_weight)

    def _settings(self, y_pred: Tensor) -> _loss_statistics.Settings:
        reading = provenance.reading(y_pred, axis=self.axis, from_logits=self.from_logits)
        axis = checked_axis(self.axis, len(y_pred.shape), "predictions")
        return _loss_statistics.Settings(type(self).__name__, reading, axis, self.ignore_class, self.logit_softcap)

    def _fits(self, settings: _loss_statistics.Settings, y_pred: Tensor) -> bool:
        """Returns whether statistics that a loss has computed under these settings are of the same quantity."""
        own = self._settings(y_pred)
        if not self._depends_on_logits:
            return settings.axis == own.axis
        return settings._replace(owner="", ignore_class=None) == own._replace(owner="", ignore_class=None)

    def _disagreement(self, record: _loss_statistics.LossRecord, y_pred: Tensor, sample_weight: Tensor) -> str | None:
        """The sentence that a user should read if the loss of these predictions means something else; else None."""
        loss = record.settings
        if loss is None or not 0 < len(y_pred.shape) > loss.axis:
            return None
        own = self._settings(y_pred)
        if loss.reading != own.reading and self._depends_on_logits:
            return _disagree(own, loss, "from_logits", own.reading == "logits", loss.reading == "logits")
        if loss.logit_softcap != own.logit_softcap and self._depends_on_logits:
            return _disagree(own, loss, "logit_softcap", own.logit_softcap, loss.logit_softcap)
        # Padding may be marked by weights in one of the two, and by labels in the other.
        is_marked = sample_weight is not None or (
            loss.ignore_class is None and (record.sample_weight is not None or _keras.mask_of(y_pred) is not None)
        )
        if loss.ignore_class != own.ignore_class and not is_marked:
            return _disagree(own, loss, "ignore_class", own.ignore_class, loss.ignore_class)
        return None

    def _warn_of_lost_mask(self, y_pred: Tensor) -> None:
        """Says that the model has a mask which this update does not see: on JAX, a gradient gives none back."""
        if is_eager(y_pred) or _keras.mask_of(y_pred) is not None or "mask" in self._warned:
            return
        if _keras.output_mask_is_lost(y_pred):
            self._warn_once(
                "mask",
                f"{type(self).__name__} '{self.name}' counts masked tokens: on JAX a metric sees the Keras mask of a "
                "model only where its loss is of keras_xent, and given to `compile` by itself. Use such a loss, or "
                "mark padding with `ignore_class` or sample weights.",
            )

    def _logits(self, y_pred: Tensor, *, is_clipped: bool = True) -> Tensor:
        """The logits, those of probabilities included; a warning where probabilities are taken for logits."""
        self._warn_of_reading(y_pred)
        given = {"from_logits": self.from_logits, "axis": self.axis, "is_clipped": is_clipped}
        return provenance.as_logits(y_pred, activation="softmax", **given)

    def _warn_of_reading(self, y_pred: Tensor, activation: str = "softmax") -> None:
        """Says once that probabilities are taken for logits, or logits for probabilities."""
        if "from_logits" in self._warned or _keras.is_building():
            return
        if provenance.activation_and_logits(y_pred, activation, self.axis)[1] is None:
            given = {"from_logits": self.from_logits, "activation": activation, "axis": self.axis}
            why, own = _endings.misread(y_pred, **given), f"{type(self).__name__} has from_logits={self.from_logits}"
            self._warn_once("from_logits", why and f"{own}, but {why}")

    def _from_record(self, record: _loss_statistics.LossRecord, sample_weight: Tensor) -> TokenValues | None:
        """The values of the tokens from the record of a loss, or None where it does not fit."""
        statistics, settings = record.statistics, record.settings
        if statistics is None or settings is None or not self._fits(settings, record.y_pred):
            return None
        if any(getattr(statistics, name) is None for name in self.needs_statistics):
            return None
        # A loss may not have computed the tokens that have weight 0 in it, and has not computed those that it ignores.
        covers_weights = record.sample_weight is None or record.sample_weight is sample_weight
        if not covers_weights or settings.ignore_class not in (None, self.ignore_class):
            return None
        labels = ops.reshape(to_tensor(record.y_true), ops.shape(statistics.nll))
        valid = valid_mask(labels, statistics.valid, self.ignore_class)
        weights = _weights(statistics.nll, valid, sample_weight)
        return TokenValues(self._values_from_statistics(statistics), weights, labels)

    def _sum(self, tokens: TokenValues) -> Tensor:
        """`[num_sums]` float32, in the order of `Totals`."""
        is_active = ops.not_equal(tokens.weights, 0)
        values = ops.where(is_active, ops.cast(tokens.values, "float32"), 0.0)
        denominators = self._denominators(tokens.weights, tokens.labels)
        parts = tokens.weights * values, denominators, ops.cast(is_active, "float32")
        return ops.stack([*map(reduction.total, parts), ops.cast(ops.size(tokens.weights), "float32")])

    def _denominators(self, weights: Tensor, labels: Tensor) -> Tensor:
        """Returns each token's contribution to the denominator."""
        return weights

    @no_autograph
    def result(self) -> Tensor:
        """The mean over all tokens; nan without a valid token."""
        return ops.cast(self._mean(), self.dtype)

    def _mean(self) -> Tensor:
        """The same in float32, as the sums are."""
        sums = Totals(*ops.unstack(self._sums.values()[: len(Totals._fields)]))
        # 0 / 0 without a token: a constant NaN would alarm those who look for NaN.
        return ops.where(ops.not_equal(sums.denominator, 0), sums.total, 0.0) / sums.denominator

    def get_config(self) -> dict[str, Any]:
        """Every argument of the constructor."""
        return {**super().get_config(), **keras.metrics.Metric.get_config(self)}


def _disagree(metric, loss, option, own, other):
    return (
        f"{metric.owner} has {option}={own!r}, and the loss {loss.owner} has {option}={other!r}, so that they are not "
        f"about the same thing. Give both the same `{option}`."
    )


def _weights(like: Tensor, valid: Tensor, sample_weight: Tensor) -> Tensor:
    """The weight of each token, float32, of the shape of `like`."""
    weights = ops.ones_like(like, dtype="float32")
    if sample_weight is not None:
        weights = weights * ops.cast(align_weights(sample_weight, like.shape, like=like), "float32")
    return weights if valid is None else ops.where(valid, weights, 0.0)
