"""Statistics of each token, passed from the loss to the metrics of the same step.

A loss calls `publish`, a metric `lookup`. TensorFlow hands the same predictions to the loss and to the metrics: there
the record is attached to them. On JAX the loss runs inside a gradient and the metrics outside, so that only the
variables of the metrics leave the gradient: there each consumer of the step gets the record at once, and keeps what it
makes of it in a `Mailbox`, a variable of its own, until it is updated with the same labels.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from keras import ops

from keras_xent import _backend, _keras
from keras_xent._types import Tensor
from keras_xent.kernels.linear import LossStatistics

# Four outputs, each with and without sample weights.
_MAILBOX_ROWS = 8


class LossRecord(NamedTuple):
    """Statistics, and the inputs of the loss. `statistics` is None where the loss did not compute any."""

    statistics: LossStatistics | None
    y_true: Tensor
    y_pred: Tensor
    sample_weight: Tensor
    # The options of the loss that a metric has too; None where another loss has computed the predictions.
    settings: "Settings | None"


class Settings(NamedTuple):
    """The options under which a loss or a metric reads predictions and labels."""

    # The class, for a message.
    owner: str
    # As `provenance.reading` says it.
    reading: str
    axis: int
    ignore_class: int | None
    logit_softcap: float | None


class Consumer(Protocol):
    """A metric that can use loss statistics."""

    needs_statistics: frozenset[str]

    def receive(self, record: LossRecord) -> None:
        """Called on JAX while the loss is computed, inside the stateless scope of the metric's variables."""

    def is_updated_in(self, scope: Any) -> bool:
        """Returns whether the variables of the metric are in a stateless scope."""


_consumers: weakref.WeakSet = weakref.WeakSet()


def register(consumer: Consumer) -> None:
    """Makes a metric known to the losses for as long as it lives."""
    _consumers.add(consumer)


def has_consumers() -> bool:
    """Whether there is a metric that could look up what a loss publishes."""
    return bool(_consumers_of_step())


def needed_statistics() -> frozenset[str]:
    """The names of the statistics that a metric of this step needs beside the nll: some cost a pass over the logits.

    Outside a step of Keras on TensorFlow it is not known which metrics will be updated: there any that is alive.
    """
    return frozenset().union(*(consumer.needs_statistics for consumer in _consumers_of_step()))


def publish(record: LossRecord) -> None:
    """Hands a record to the metrics of this step."""
    if not _backend.METRICS_SEE_PREDICTIONS_OF_LOSS:
        matched = _matched_to_step(record)
        for consumer in _consumers_of_step() if matched else ():
            consumer.receive(matched)
    else:
        # The predictions themselves would keep each other alive.
        _backend.set_attribute(record.y_pred, "_keras_xent_statistics", record._replace(y_pred=None))


def _matched_to_step(record):
    """The record if it is of the labels and predictions of the step, as its metrics will see them.

    Inside a user's function or Loss, ours may get others: of these nothing is used, but the only predictions of a step
    are still known here with their mask, which is lost outside the gradient.
    """
    step = _keras.data_of_step()
    if step is None or any(record.y_pred is p and record.y_true is y for y, p in zip(step.y_true, step.y_pred)):  # noqa: B905
        return record
    if len(step.y_true) == len(step.y_pred) == 1:
        weight = step.sample_weight[0] if len(step.sample_weight) == 1 else None
        return LossRecord(None, step.y_true[0], step.y_pred[0], weight, None)
    return None


def lookup(y_true: Tensor, y_pred: Tensor) -> LossRecord | None:
    """The record that a loss has published for these labels and predictions, or None."""
    record = _backend.get_attribute(y_pred, "_keras_xent_statistics")
    return record if record is not None and record.y_true is y_true else None


def _consumers_of_step():
    if _backend.METRICS_SEE_PREDICTIONS_OF_LOSS:
        alive = list(_consumers)
        updated = _keras.metrics_of_step() if alive else None
        return alive if updated is None else [one for one in alive if any(one is other for other in updated)]
    scope = _keras.stateless_scope()
    return [] if scope is None else [one for one in list(_consumers) if one.is_updated_in(scope)]


class Mailbox:
    """Sums that a metric has made of records inside the gradient, for its update outside: one row for each record."""

    def __init__(self, metric: Any, num_sums: int) -> None:
        self._variable: Any = None
        self._keys: list[tuple[Callable, Callable]] = []
        # The variable's value before the first of these.
        self._before: Callable = lambda: None
        if not _backend.METRICS_SEE_PREDICTIONS_OF_LOSS:
            self._variable = metric.add_variable(
                (_MAILBOX_ROWS, num_sums), initializer="zeros", dtype="float32", name="mailbox"
            )

    def put(self, y_true: Tensor, sample_weight: Tensor, sums: Tensor) -> None:
        """Keeps `[num_sums]` float32 for an update with these labels and weights; nothing where it is full."""
        row = len(self._keys)
        if row < _MAILBOX_ROWS:
            if not row:
                self._before = weakref.ref(self._variable.value)
            rows = ops.slice_update(ops.convert_to_tensor(self._variable), (row, 0), ops.stop_gradient(sums)[None])
            self._variable.assign(rows)
            weight = (lambda: None) if sample_weight is None else weakref.ref(sample_weight)
            self._keys.append((weakref.ref(y_true), weight))

    def take(self, y_true: Tensor, sample_weight: Tensor) -> Tensor | None:
        """The sums kept for these labels and weights, or None; the mailbox is empty then."""
        keys, self._keys = self._keys, []
        if keys and self._before() is self._variable.value:
            # A step of the user's own has not handed on the variables that left the gradient.
            return None
        rows = [i for i, (labels, weight) in enumerate(keys) if labels() is y_true and weight() is sample_weight]
        # Of two outputs with the very same labels it is not known which is this one's.
        return ops.convert_to_tensor(self._variable)[rows[0]] if len(rows) == 1 else None
