"""The loss of the last batch and its worst tokens, left where they can be read after the step."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_xent import _keras, _loss_statistics
from keras_xent._types import Tensor
from keras_xent.metrics import Perplexity

CONTEXT = 8


class WorstToken(NamedTuple):
    """A token of a batch: its loss in nats, its label, where it is, and the labels before it."""

    nll: float
    label: int
    sequence: int
    position: int
    context: list[int]


class BatchLoss(keras.metrics.Metric):
    """Loss, mean nll in nats and the `worst` tokens with the largest nll of the last batch that was trained.

    Keras shows labels and predictions of a step to its loss, and a step can leave numbers only in variables of the
    model, the optimizer or the metrics. So this stands around the loss and is a metric that has no place in the logs.
    """

    is_in_logs = False
    # As a consumer of loss statistics: see `_loss_statistics`.
    needs_statistics: frozenset[str] = frozenset()

    def __init__(self, worst: int, loss: Any, name: str = "batch_loss", dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.worst, self.of = worst, loss
        # In a tuple, where Keras does not look for variables. It computes the values of tokens and sums up none.
        self._tokens = (_tokens_of(loss),)
        self._record: _loss_statistics.LossRecord | None = None
        self._unwatch: Callable[[], None] | None = None
        # The loss, the mean nll, and the number of valid tokens.
        self._means = self.add_variable((3,), initializer="zeros", dtype="float32", name="means")
        self._nll = self.add_variable((worst,), initializer="zeros", dtype="float32", name="worst_nll")
        # Label, sequence, position, and the labels before it; -1 where there is none.
        self._places = self.add_variable((worst, 3 + CONTEXT), initializer="zeros", dtype="int32", name="worst_places")
        _loss_statistics.register(self)

    @property
    def knows_tokens(self) -> bool:
        """True if the loss has one value for each token."""
        return self._tokens[0] is not None

    @classmethod
    def watching(cls, model: Any, worst: int) -> "BatchLoss":
        """The loss of the batches of a model, from the next call of `fit` on until `unwatch`."""
        if getattr(getattr(model, "distribute_strategy", None), "num_replicas_in_sync", 1) > 1:
            raise ValueError("SpikeDetector does not work under tf.distribute: each replica has a loss of its own.")
        watched = getattr(model, "_keras_xent_batch_loss", None)
        if watched is not None and (watched.worst != worst or watched.of is not model.loss):
            watched.unwatch()
            watched = None
        if watched is None:
            # As an attribute of the model its variables are part of the state of the training step.
            watched = model._keras_xent_batch_loss = cls(worst, model.loss)
        if watched._unwatch is None:
            watched._watch(model)
        return watched

    def _watch(self, model):
        compute_loss = model.compute_loss
        reference: Callable[[], Any] = weakref.ref(model)
        takes_training = "training" in inspect.signature(compute_loss).parameters

        def watched(x=None, y=None, y_pred=None, sample_weight=None, training=True):
            self._record = None
            loss = compute_loss(x, y, y_pred, sample_weight, **({"training": training} if takes_training else {}))
            if training:
                self._observe(loss, y, y_pred, sample_weight)
            self._record = None
            return loss

        def unwatch():
            watched_model = reference()
            if watched_model is not None:
                watched_model.compute_loss, watched_model.train_function = compute_loss, None

        model.compute_loss, model.train_function, self._unwatch = watched, None, unwatch

    def unwatch(self) -> None:
        """Leaves the model as it was: its next step is compiled without this."""
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None

    def receive(self, record: _loss_statistics.LossRecord) -> None:
        """Called on JAX while the loss is computed."""
        self._record = record

    def is_updated_in(self, scope: Any) -> bool:
        """Returns whether the variables of this metric are in a stateless scope."""
        return scope.get_current_value(self._nll) is not None

    def _observe(self, loss: Tensor, y: Tensor, y_pred: Tensor, sample_weight: Tensor) -> None:
        (tokens,) = self._tokens
        nll = num_valid = ops.zeros((), dtype="float32")
        if tokens is not None and hasattr(y, "shape") and hasattr(y_pred, "shape"):
            found = None if self._record is None else tokens._from_record(self._record, sample_weight)
            values, weights, labels = found or tokens._token_values(y, y_pred, sample_weight)
            values = ops.stop_gradient(ops.cast(values, "float32"))
            is_active = ops.not_equal(weights, 0)
            num_valid = ops.sum(ops.cast(is_active, "float32"))
            nll = ops.sum(ops.where(is_active, values * weights, 0.0)) / ops.maximum(ops.sum(weights), 1e-30)
            # Labels of one sequence: all but the first axis.
            length = ops.maximum(ops.cast(ops.size(labels), "int32") // ops.maximum(ops.shape(y)[0], 1), 1)
            self._observe_tokens(ops.where(is_active, values, float("-inf")), labels, length)
        self._means.assign(ops.stack([ops.cast(ops.stop_gradient(loss), "float32"), nll, num_valid]))

    def _observe_tokens(self, values: Tensor, labels: Tensor, length: Tensor) -> None:
        labels = ops.cast(ops.reshape(labels, (-1,)), "int32")  # [N]
        missing = ops.full((self.worst,), float("-inf"), dtype="float32")
        values = ops.concatenate([ops.reshape(values, (-1,)), missing])  # [N + worst]
        _, index = ops.top_k(ops.where(ops.isnan(values), float("inf"), values), self.worst)
        index = ops.cast(index, "int32")
        self._nll.assign(ops.take(values, index))
        sequence, position = (part[:, None] for part in (index // length, index % length))
        # The token itself and those before it in its sequence.
        back = ops.arange(CONTEXT, -1, -1, dtype="int32")
        places = index[:, None] - back  # [worst, CONTEXT + 1]
        last = ops.cast(ops.size(labels), "int32") - 1
        around = ops.take(labels, ops.clip(places, 0, ops.maximum(last, 0)))
        around = ops.where(ops.logical_and(position >= back, places <= last), around, -1)
        self._places.assign(ops.concatenate([around[:, -1:], sequence, position, around[:, :-1]], axis=1))

    def read(self, model: Any) -> tuple[float, float | None, list[WorstToken]]:
        """Loss, mean nll (None without a valid token) and the worst tokens. Waits for the device."""
        with _keras.training_state(model):
            means, nll, places = map(ops.convert_to_numpy, (self._means, self._nll, self._places))
        loss, mean, num_valid = means.tolist()
        rows = [(value, *place.tolist()) for value, place in zip(nll.tolist(), places, strict=True)]
        worst = [
            WorstToken(value, label, sequence, position, [one for one in context if one >= 0])
            for value, label, sequence, position, *context in rows[: int(num_valid)]
        ]
        return loss, mean if num_valid else None, worst

    def update_state(self, *arguments: Any, **named: Any) -> None:
        """Does nothing: the loss passes the batch to `receive`."""

    def result(self) -> dict[str, Any]:
        """No entries for the logs."""
        return {}

    def reset_state(self) -> None:
        """Keeps the last batch."""

    def save_own_variables(self, store: Any) -> None:
        """Saves nothing: a model is saved as if it were not watched."""

    def load_own_variables(self, store: Any) -> None:
        """Loads nothing."""


def _tokens_of(loss: Any) -> Perplexity | None:
    """Returns the metric that computes the nll of tokens as a sparse loss does; None for another loss."""
    if not hasattr(loss, "logit_softcap") or not hasattr(loss, "ignore_class"):
        return None
    options = {"ignore_class": loss.ignore_class, "axis": loss.axis, "logit_softcap": loss.logit_softcap}
    return Perplexity(from_logits=loss.from_logits, name="watched", **options)
