"""Keras' hooks, turned into what is worth writing: batches, epochs, validations and evaluations."""

import time
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import keras

from keras_xent._keras import training_state
from keras_xent.callbacks._metric_reader import MetricReader
from keras_xent.callbacks._timeline import Mark, Timeline
from keras_xent.metrics._token_mean import Totals

# The logs of a model that `fit` trains right now: what is validated within an epoch is written by them.
_active: weakref.WeakKeyDictionary[Any, "weakref.WeakSet[TrainingLog]"] = weakref.WeakKeyDictionary()


class Batches(NamedTuple):
    """The batches since the last that were written: their metrics, the sums of perplexities, number and duration."""

    values: dict[str, float]
    totals: dict[str, Totals]
    steps: int
    seconds: float


class Epoch(NamedTuple):
    """An epoch: its number, the steps until its end, Keras' logs, the sums of perplexities, number and duration."""

    number: int
    mark: Mark
    logs: dict[str, Any]
    train: dict[str, Totals]
    validation: dict[str, Totals]
    steps: int
    seconds: float


class TrainingLog(keras.callbacks.Callback):
    """Base of the callbacks that write down how a training goes.

    A subclass says what it does with batches, epochs, validations and evaluations, each at its number of steps. Steps
    and epochs continue over several calls of `fit`, and in a new process from the marks that `read_marks` finds. A step
    after which nothing is written does not wait for the device. A copy (`copy.deepcopy`, `pickle`) has the settings of
    the original and none of its training.
    """

    # After how many steps batches are written, or "epoch".
    update_freq: Any = "epoch"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # What it does at the end of a batch is one division: Keras need not wait for it.
        self.async_safe = True
        self._before_training: dict[str, Any] | None = None

    # What a subclass says.

    def read_marks(self) -> Iterable[Mark]:
        """Returns the marks of an earlier process that wrote into the same log."""
        return ()

    def write_begin(self, mark: Mark) -> None:
        """The first epoch of a `fit` begins at this place."""

    def write_batches(self, mark: Mark, batches: Batches) -> None:
        """Batches have ended."""

    def write_epoch(self, epoch: Epoch) -> None:
        """An epoch has ended, and its validation."""

    def write_validation(self, step: int, logs: dict[str, Any], totals: dict[str, Totals]) -> None:
        """The model was validated within or at the end of an epoch; `logs` without `val_`."""

    def write_evaluation(self, step: int, logs: dict[str, Any], totals: dict[str, Totals]) -> None:
        """`evaluate` was called by itself, or by another callback."""

    def write_end(self, step: int, logs: dict[str, Any]) -> None:
        """`fit` has ended."""

    # What Keras says.

    def set_model(self, model: Any) -> None:
        """Called by `fit` and by `evaluate`."""
        if self._before_training is None:
            self._before_training = self.__dict__.copy()
            self._timeline = Timeline()
            self._in_fit = False
        # `fit` has one set of callbacks: another begins within it when a callback calls `evaluate`. It is a new `fit`
        # after one that was interrupted if `on_train_begin` follows.
        self._evaluated = model
        if not self._in_fit:
            self._follow(model)

    def _follow(self, model):
        """The model is the one that is trained, or evaluated outside of `fit`."""
        keras.callbacks.Callback.set_model(self, model)
        self._reader = MetricReader(model)
        self._evaluated, self._in_fit = None, False
        self._begin_epoch()

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        if self._evaluated is not None:
            self._follow(self._evaluated)
        model = self._reader.model
        self._timeline.begin_fit(model, (self.params or {}).get("steps"))
        self._in_fit = self._first_epoch_pending = True
        self._fit = getattr(model, "history", None)
        _active.setdefault(model, weakref.WeakSet()).add(self)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        self._timeline.begin_epoch(epoch, self.read_marks)
        self._begin_epoch()
        self._epoch = self._timeline.number(epoch)
        if self._first_epoch_pending:
            self._first_epoch_pending = False
            self.write_begin(self._timeline.mark())

    def _begin_epoch(self):
        self._reader.reset()
        self._train_totals: dict[str, Totals] = {}
        self._validation_totals: dict[str, Totals] = {}
        self._steps_written = self._steps_before_epoch = self._timeline.steps
        self._clock = self._epoch_clock = time.perf_counter()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes what the batches before have brought: at their end Keras would make the device wait for the logs."""
        if self._timeline.begin_batch(batch, self.update_freq):
            self._write_batches()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        self._timeline.end_batch(batch)

    def _write_batches(self):
        # Once for all that is read.
        with training_state(self._reader.model):
            totals = self._reader.new_totals()
            if totals and not any(new.labels for new in totals.values()):
                # The data has run out where Keras did not know its length.
                return
            values, now, steps = self._reader.new_values(), time.perf_counter(), self._timeline.steps
            batches = Batches(values, totals, steps - self._steps_written, now - self._clock)
            self._steps_written, self._clock = steps, now
            self.write_batches(self._timeline.mark(), batches)

    def _end_batches(self):
        """The batches of an epoch have ended, and their metrics are still there."""
        if self._timeline.batches_ended:
            return
        if self._timeline.end_batches(self.update_freq):
            self._write_batches()
        self._train_totals = self._reader.totals()
        self._epoch_seconds = time.perf_counter() - self._epoch_clock

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        if self._in_fit and self._evaluated is None:
            self._end_batches()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        logs, step = dict(logs or {}), self._timeline.steps
        if self._evaluated is not None:
            self.write_evaluation(step, logs, MetricReader(self._evaluated).totals())
            self._evaluated = None
        elif self._in_fit:
            self._validation_totals = self._reader.totals()
            self.write_validation(step, logs, self._validation_totals)
        else:
            self.write_evaluation(step, logs, self._reader.totals())

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        self._end_batches()
        mark = self._timeline.mark(epoch)
        steps = mark.step - self._steps_before_epoch
        number, totals = self._timeline.number(epoch), (self._train_totals, self._validation_totals)
        self.write_epoch(Epoch(number, mark, {} if logs is None else logs, *totals, steps, self._epoch_seconds))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        self._in_fit = False
        _active.get(self._reader.model, set()).discard(self)
        self.write_end(self._timeline.steps, dict(logs or {}))

    def validated(self, batch: int, logs: dict[str, Any], totals: dict[str, Totals]) -> None:
        """The model was validated after a batch of the epoch."""
        self.write_validation(self._timeline.step_after(batch), logs, totals)

    def paused(self, seconds: float) -> None:
        """Nothing was trained in the last seconds."""
        self._clock += seconds
        self._epoch_clock += seconds

    def __getstate__(self) -> dict[str, Any]:
        if self._before_training is None:
            return self.__dict__.copy()
        # Settings that were changed since stay.
        settings = {name: value for name, value in self.__dict__.items() if not name.startswith("_")}
        return {**self._before_training, **settings, "params": None}


def active_logs(model: Any) -> list[TrainingLog]:
    """The logs that write down the `fit` of a model right now."""
    # Each `fit` has a history of its own, and one that was interrupted has left its logs here.
    return [log for log in _active.get(model, ()) if log._fit is getattr(model, "history", None)]
