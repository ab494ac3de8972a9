"""Validation every few steps, within long epochs."""

import itertools
import time
import types
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_xent import _keras, arguments
from keras_xent.callbacks._metric_reader import MetricReader
from keras_xent.callbacks._timeline import Timeline
from keras_xent.callbacks._training_log import active_logs


class ValidateEvery(keras.callbacks.Callback):
    """Validates the model every few steps, where an epoch is too long to wait for its end.

    Training is unharmed: weights, metrics, random numbers and history are bit for bit as without it. The numbers go

    - to `callbacks.TensorBoard` and `callbacks.PerplexityLogger` of the same `fit`, at their step, wherever these stand
      in the list;
    - as `val_loss`, `val_perplexity`, ... into the logs of the batch after which they were measured, and the last ones
      of an epoch into those of the epoch. Callbacks that stand behind this one see them: `EarlyStopping` and
      `ModelCheckpoint` at the end of the epoch, `ModelCheckpoint(save_freq=steps)` at the batch;
    - to `callbacks` at once: an `EarlyStopping(patience=3)` given there stops within an epoch, after three validations
      without an improvement;
    - into `history`, a dict of lists with `step`, `val_loss`, ...

    Steps are batches. They are counted over all epochs and calls of `fit`, from what the optimizer of a model that was
    loaded has counted. Do not also give `validation_data` to `fit`, unless the end of the epoch is to be validated too.

    Args:
        steps: after how many steps. Where several are executed at once, at the end of the execution.
        validation_data: what `fit` takes: `(x, y)`, `(x, y, sample_weight)`, a dataset or a generator. The batches of a
            generator are kept in memory, since it cannot begin again.
        batch_size: of arrays; None is Keras' 32.
        validation_steps: how many batches of a dataset or generator; None is all.
        callbacks: callbacks to which a validation is the end of an epoch, with its number as that of the epoch:
            `EarlyStopping`, `ModelCheckpoint`, `ReduceLROnPlateau`, `CSVLogger`. They also see the validation itself,
            so that `SwapEMAWeights` validates the averages.
        verbose: 0 for no output, 1 for a progress bar, 2 for a line after each validation.

    Raises:
        ValueError: `steps` that is no number of batches; no `validation_data`; a `ModelCheckpoint` of batches among
            the `callbacks`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_xent as kx
    >>> data = np.ones((32, 8)), np.zeros(32)
    >>> stop = keras.callbacks.EarlyStopping("val_loss", patience=3)
    >>> callback = kx.callbacks.ValidateEvery(500, data, callbacks=[stop])
    """

    def __init__(
        self,
        steps: int,
        validation_data: Any,
        batch_size: int | None = None,
        validation_steps: int | None = None,
        *,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        verbose: Any = 0,
    ) -> None:
        super().__init__()
        self.steps = arguments.count("steps", steps)
        if validation_data is None:
            raise ValueError(
                "`validation_data` must be (x, y), (x, y, sample_weight), a dataset or a generator. Received: None."
            )
        self.validation_data = validation_data
        self.batch_size, self.validation_steps, self.verbose = batch_size, validation_steps, verbose
        self.callbacks = list(callbacks)
        for callback in self.callbacks:
            if getattr(callback, "save_freq", "epoch") != "epoch":
                raise ValueError(
                    "`callbacks` see no batches: a ModelCheckpoint among them must have save_freq='epoch', which is "
                    f"each validation, or be given to `fit`. Received: save_freq={callback.save_freq!r}."
                )
        self.history: dict[str, list[Any]] = {}
        # The batches of a generator.
        self._generated: list[Any] | None = None
        self._timeline = Timeline()
        self._last: dict[str, float] = {}

    def set_model(self, model: Any) -> None:
        """Called by `fit`, and by `evaluate` if it is given this."""
        super().set_model(model)
        for callback in self.callbacks:
            callback.set_model(model)

    def set_params(self, params: dict[str, Any]) -> None:
        """See `keras.callbacks.Callback`."""
        super().set_params(params)
        for callback in self.callbacks:
            callback.set_params(params)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        self._timeline.begin_fit(self.model, (self.params or {}).get("steps"))
        self._last = {}
        for callback in self.callbacks:
            callback.on_train_begin(logs)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        self._timeline.begin_epoch(epoch, tuple)
        # A result of an epoch before would be one more without an improvement.
        self._last = {}

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        self._timeline.begin_batch(batch, "epoch")

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Validates where it is time to, and puts the results into the logs."""
        self._timeline.end_batch(batch)
        step = self._timeline.step_after(batch)
        if self._timeline.steps // self.steps == step // self.steps:
            return
        # On JAX this waits for the steps before, whose time is that of the training.
        before, averaged = _values_of_training(self.model), self._values_of_averages()
        begin = time.perf_counter()
        self._last = self._validate(batch, step)
        _restore(before + averaged)
        if logs is not None:
            logs.update(self._last)
        number = step // self.steps - 1
        for callback in self.callbacks:
            callback.on_epoch_end(number, {**(logs or {}), **self._last})
        for callback in self.callbacks:
            callback.on_epoch_begin(number + 1)
        _restore(averaged)
        for log in active_logs(self.model):
            log.paused(time.perf_counter() - begin)

    def _values_of_averages(self):
        """What `SwapEMAWeights` exchanges, on TensorFlow by sums; it does not undo what it does in the last epoch."""
        if not any(isinstance(callback, keras.callbacks.SwapEMAWeights) for callback in self.callbacks):
            return []
        averages = [one for one in self.model.optimizer.variables if one.path.endswith("_average")]
        return _values_of([*self.model.trainable_variables, *averages])

    def _validate(self, batch, step):
        model = self.model
        data, steps = self._data_and_steps()
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        evaluated = model.evaluate(
            x,
            y,
            self.batch_size,
            self.verbose,
            sample_weight,
            steps,
            list(self.callbacks),
            return_dict=True,
        )
        # `evaluate` has given them its own.
        for callback in self.callbacks:
            callback.set_params(self.params)
        totals = MetricReader(model).totals()
        for log in active_logs(model):
            log.validated(batch, evaluated, totals)
        named = {f"val_{name}": value for name, value in evaluated.items()}
        for name, value in {"step": step, **named}.items():
            self.history.setdefault(name, []).append(value)
        return named

    def _data_and_steps(self):
        if not isinstance(self.validation_data, types.GeneratorType):
            return self.validation_data, self.validation_steps
        if self._generated is None:
            self._generated = list(itertools.islice(self.validation_data, self.validation_steps))
        return (batch for batch in self._generated), len(self._generated)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Puts the last results into the logs, where `fit` has not validated itself."""
        self._timeline.end_batches("epoch")
        self._timeline.mark(epoch)
        if logs is not None and not any(name.startswith("val_") for name in logs):
            logs.update(self._last)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        for callback in self.callbacks:
            callback.on_train_end(logs)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has the settings, and no model.
        return {**self.__dict__, "_model": None, "params": None}


def _values_of_training(model):
    """What a validation changes, and its values: metrics, which `evaluate` resets, and states of seeds and layers."""
    weights = {id(variable) for variable in model.non_trainable_weights}
    seeds = [variable for variable in model.non_trainable_variables if id(variable) not in weights]
    # Of recurrent layers, from one batch to the next.
    stateful = [layer for layer in _keras.all_layers(model) if getattr(layer, "stateful", False)]
    states = [state for layer in stateful for state in keras.tree.flatten(getattr(layer, "states", None) or [])]
    return _values_of([*model.metrics_variables, *seeds, *states])


def _values_of(variables):
    return [(variable, ops.convert_to_numpy(variable)) for variable in variables]


def _restore(values):
    for variable, value in values:
        variable.assign(value)
