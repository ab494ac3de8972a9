"""Losses that are no numbers, and sudden jumps of the loss, with the tokens that caused them."""

import math
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from keras_xent import arguments
from keras_xent._types import Batches
from keras_xent.callbacks._batch_loss import BatchLoss
from keras_xent.callbacks._token_text import TokenText

_WHEN: tuple[str, ...] = typing.get_args(Batches)
_MOST_WARNINGS = 20


class SpikeDetector(keras.callbacks.Callback):
    """Reports batches whose loss is NaN or infinite or jumps, with their numbers and their worst tokens.

    To find broken data, and learning rates that are too high. A jump is a loss of more than `threshold` standard
    deviations above the mean of the batches before. Of a sparse loss of this package the mean nll of the batch's valid
    tokens is watched, and the report names the tokens with the largest; of another loss, its value. Each report is a
    warning (the first 20) and an entry of `reports`.

    With `skip`, the step of such a batch is left out: the batch trains nothing, and everything is as if it had not been
    there, bit for bit. That is, weights, the optimizer's state and its `iterations`, moving averages, the state of
    random numbers, and metrics (so that `loss` in the logs stays finite). Only the number of the batch, and what
    callbacks count themselves, goes on. The step is judged on the device before its update, of which no copy is made;
    a finite loss whose gradient is not counts as not finite. A spike that was skipped still raises what is usual, so
    that training goes on where losses have become larger for good.

    It waits for the device after each batch and needs a recompilation: use it for the search. Where several steps are
    executed at once, each is judged and may be skipped, and the last of them is reported. Of a model with
    `keras_xent.accumulate_gradients` whole batches are judged and skipped; the sequences of its worst tokens are
    counted in their micro-batch. Gradients that are infinite by the scale of a `keras.optimizers.LossScaleOptimizer`
    are left to it. A `train_step` of your own is watched if it computes its loss by `compute_loss`, and may be skipped
    if it calls its optimizer once.

    Args:
        threshold: standard deviations above the mean that are a spike; a spread below 1 % of the mean counts as 1 %.
        window: of how many batches before mean and spread are taken. Of the first 10 none is a spike.
        worst: how many tokens a report names.
        stop: `"never"`, `"non_finite"` (training stops after a NaN or infinite loss) or `"always"` (after a spike too).
        skip: `"never"`, `"non_finite"` (a step whose loss or gradient is NaN or infinite is left out) or `"always"`
            (spikes too).
        decode: how tokens are read: a function from number to text, a list of texts, or a dict.

    Raises:
        ValueError: a `threshold` that is not above 0; a `window` or `worst` that is no number; an unknown `stop` or
            `skip`; two in one `fit`; under `tf.distribute`; on JAX a model whose `metrics` are without Keras'.

    Example:

    >>> import keras_xent as kx
    >>> callback = kx.callbacks.SpikeDetector(threshold=6.0, stop="non_finite")
    """

    def __init__(
        self,
        threshold: float = 6.0,
        window: int = 100,
        *,
        worst: int = 5,
        stop: Batches = "never",
        skip: Batches = "never",
        decode: Callable[[int], str] | Sequence[str] | Mapping[int, str] | None = None,
    ) -> None:
        super().__init__()
        self.threshold = arguments.above_zero("threshold", threshold)
        self.window, self.worst = arguments.count("window", window), arguments.count("worst", worst)
        for argument, value in (("stop", stop), ("skip", skip)):
            if value not in _WHEN:
                allowed = ", ".join(map(repr, _WHEN))
                raise ValueError(f"`{argument}` must be one of {allowed}. Received: {argument}={value!r}.")
        self.stop, self.skip, self._text = stop, skip, TokenText(decode)
        self.reports: list[dict[str, Any]] = []
        self.num_skipped = 0
        self._epoch = 0
        self._watched: Any = None
        # On JAX `self.model` would copy the state.
        self._trained: Any = None

    def set_model(self, model: Any) -> None:
        """Called by `fit` and by `evaluate`."""
        super().set_model(model)
        if self._watched is None or not self._watched.watches(model):
            self._watched = BatchLoss(model.loss, self.threshold, self.window, self.worst, self.skip)
        self._trained = model
        self._watched.watch(model)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Reports the batch that was trained, if there is a reason to."""
        verdict, worst, self.num_skipped = self._watched.read(self._trained)
        if verdict.is_not_finite or verdict.is_spike:
            self._report(batch, verdict, worst)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        self._watched.unwatch()

    def _report(self, batch, verdict, worst):
        kind = "non_finite" if verdict.is_not_finite else "spike"
        mean = None if math.isnan(verdict.mean) else verdict.mean
        self.reports.append(
            {
                "kind": kind,
                "epoch": self._epoch,
                "batch": batch,
                "loss": verdict.value,
                "mean": mean,
                "skipped": verdict.is_skipped,
                "worst_tokens": [one._asdict() for one in worst],
            }
        )
        if len(self.reports) <= _MOST_WARNINGS:
            arguments.warn(self._message(batch, verdict, worst))
        if self.stop == "always" or self.stop == kind:
            self.model.stop_training = True

    def _message(self, batch, verdict, worst):
        value, mean, spread = verdict[:3]
        what = f"The loss of batch {batch} of epoch {self._epoch} is {value:.4g}"
        if verdict.is_spike:
            what += (
                f", {(value - mean) / spread:.1f} standard deviations above the mean of the batches before, {mean:.4g}"
            )
        elif math.isfinite(value):
            what += ", and its gradient is not finite"
        skipped = " Its step was skipped." if verdict.is_skipped else ""
        lines = [
            f"  {one.nll:.3f} nats: {self._text(one.label)!r} in sequence {one.sequence} at {one.position}, "
            f"after {' '.join(map(self._text, one.context))!r}"
            for one in worst
        ]
        return "\n".join([f"{what}.{skipped}{' Its worst tokens:' if lines else ''}", *lines])

    def __getstate__(self) -> dict[str, Any]:
        # A copy has the settings, and no model.
        return {**self.__dict__, "_watched": None, "_trained": None, "_model": None, "params": None}
