"""Losses that are no numbers, and sudden jumps of the loss, with the tokens that caused them."""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_xent import arguments
from keras_xent.callbacks._batch_loss import BatchLoss
from keras_xent.callbacks._token_text import TokenText

_STOPS = ("never", "non_finite", "always")
_FEWEST, _MOST_WARNINGS = 10, 20
# A loss that hardly moves has a spread of almost 0.
_SMALLEST_SPREAD = 0.01


class SpikeDetector(keras.callbacks.Callback):
    """Reports batches whose loss is NaN or infinite or jumps, with their numbers and their worst tokens.

    To find broken data, and learning rates that are too high. A jump is a loss of more than `threshold` standard
    deviations above the mean of the batches before. Of a sparse loss of this package the mean nll of the batch's valid
    tokens is watched, and the report names the tokens with the largest; of another loss, its value. Each report is a
    warning (the first 20) and an entry of `reports`.

    It waits for the device after each batch and needs a recompilation: use it for the search. Where several steps are
    executed at once, it sees the last of them.

    Nothing is skipped: when a batch is reported, its update has been made. Where updates with infinite gradients are to
    be left out, `keras.optimizers.LossScaleOptimizer` does that; to go back, load a checkpoint.

    Args:
        threshold: standard deviations above the mean that are a spike; a spread below 1 % of the mean counts as 1 %.
        window: of how many batches before mean and spread are taken. The first 10 are not judged.
        worst: how many tokens a report names.
        stop: `"never"`, `"non_finite"` (training stops after a NaN or infinite loss) or `"always"` (after a spike too).
        decode: how tokens are read: a function from number to text, a list of texts, or a dict.

    Raises:
        ValueError: a `threshold` that is not above 0; a `window` or `worst` that is no number; an unknown `stop`; under
            `tf.distribute`.

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
        stop: str = "never",
        decode: Callable[[int], str] | Sequence[str] | Mapping[int, str] | None = None,
    ) -> None:
        super().__init__()
        if threshold is None:
            raise ValueError("`threshold` must be a number above 0. Received: threshold=None.")
        self.threshold: Any = arguments.positive("threshold", threshold)
        self.window, self.worst = arguments.count("window", window), arguments.count("worst", worst)
        if stop not in _STOPS:
            raise ValueError(f"`stop` must be one of {', '.join(map(repr, _STOPS))}. Received: stop={stop!r}.")
        self.stop, self._text = stop, TokenText(decode)
        self.reports: list[dict[str, Any]] = []
        self._before: collections.deque[float] = collections.deque(maxlen=self.window)
        self._epoch = 0
        self._trained: Any = None
        self._watched: Any = None

    def set_model(self, model: Any) -> None:
        """Called by `fit` and by `evaluate`."""
        super().set_model(model)
        self._trained, self._watched = model, BatchLoss.watching(model, self.worst)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Judges the batch that was trained."""
        loss, nll, worst = self._watched.read(self._trained)
        # Where the nll is finite and the loss is not, it comes from elsewhere: a regularizer, or another output.
        value = loss if nll is None or not math.isfinite(loss) and math.isfinite(nll) else nll
        mean, spread = self._usual()
        if not math.isfinite(value):
            self._report("non_finite", batch, value, mean, spread, worst)
        elif mean is not None and value > mean + self.threshold * spread:
            self._report("spike", batch, value, mean, spread, worst)
            # One spike is not to hide the next.
            self._before.append(mean + self.threshold * spread)
        elif nll is not None or not self._watched.knows_tokens:
            self._before.append(value)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        self._watched.unwatch()

    def _usual(self):
        if len(self._before) < min(_FEWEST, self.window):
            return None, math.nan
        mean = float(np.mean(self._before))
        return mean, max(float(np.std(self._before)), _SMALLEST_SPREAD * abs(mean))

    def _report(self, kind, batch, value, mean, spread, worst):
        tokens = [one._asdict() for one in worst]
        self.reports.append(
            {"kind": kind, "epoch": self._epoch, "batch": batch, "loss": value, "mean": mean, "worst_tokens": tokens}
        )
        if len(self.reports) <= _MOST_WARNINGS:
            arguments.warn(self._message(kind, batch, value, mean, spread, worst))
        if self.stop == "always" or self.stop == kind:
            self.model.stop_training = True

    def _message(self, kind, batch, value, mean, spread, worst):
        what = f"The loss of batch {batch} of epoch {self._epoch} is {value:.4g}"
        if kind == "spike":
            what += (
                f", {(value - mean) / spread:.1f} standard deviations above the mean of the batches before, {mean:.4g}"
            )
        lines = [
            f"  {one.nll:.3f} nats: {self._text(one.label)!r} in sequence {one.sequence} at {one.position}, "
            f"after {' '.join(map(self._text, one.context))!r}"
            for one in worst
        ]
        return "\n".join([f"{what}.{' Its worst tokens:' if lines else ''}", *lines])

    def __getstate__(self) -> dict[str, Any]:
        # A copy has the settings, and no model.
        return {**self.__dict__, "_watched": None, "_trained": None, "_model": None, "params": None}
