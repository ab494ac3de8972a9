"""Perplexity in the progress bar, in a file and as a picture, without TensorBoard."""

import csv
import importlib.util
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_xent import arguments
from keras_xent.callbacks.readings import NO_PERPLEXITY, Perplexed, Readings, is_running
from keras_xent.callbacks.timeline import Epoch, Timeline
from keras_xent.metrics._token_mean import Totals

_UNITS = ("tokens", "nll", "perplexity", "bits_per_token")
_COLUMNS = ("of", "epoch", "step", "seconds", *_UNITS, *(f"val_{unit}" for unit in _UNITS))

_HEADER = ",".join(_COLUMNS) + "\r\n"
_PICTURES = (".png", ".svg", ".pdf", ".jpg")


class PerplexityLogger(keras.callbacks.Callback):
    """Logs the perplexity of training and validation, for people without TensorBoard.

    - The progress bar and the history get `bits_per_token` beside the perplexity.
    - A file gets a row at the end of each epoch, and if asked for every few batches, then over these batches. Each is
      written at once, so that an interrupted run loses none; half a row that a killed one leaves is passed over.
    - A picture at the end of training shows the perplexity of train and validation against the steps.

    Epochs and steps go on over several calls of `fit`, and in a new process where the optimizer was loaded: rows of
    steps that are trained again are written again. A file of another training is kept under a name with a number.

    Needs `keras_xent.metrics.Perplexity` in the model; of several the first counts.

    Formula: `nll = sum_n t_n nll_n / sum_n t_n`, `perplexity = exp(nll)`, `bits = nll / ln 2`.

    Args:
        path: a file that ends in `.csv` or `.jsonl`, or None. Columns: `of` ("epoch" or "batches"), `epoch` from 0,
            `step`, `seconds` since training began, then `tokens` that count, `nll` in nats, `perplexity` and
            `bits_per_token`, and the same of validation with `val_`.
        picture: a file that ends in `.png`, `.svg`, `.pdf` or `.jpg`, or None.
        update_freq: `"epoch"`, or after how many batches a row is written too.

    Raises:
        ValueError: a path or a picture of another kind; an `update_freq` that is no number of batches.
        ImportError: `picture` without Matplotlib.

    Example:

    >>> import keras_xent as kx
    >>> callback = kx.callbacks.PerplexityLogger("run.csv", update_freq=100)
    """

    def __init__(self, path: Any = None, *, picture: Any = None, update_freq: Any = "epoch") -> None:
        super().__init__()
        self.path: Any = None if path is None else os.fspath(path)
        if self.path is not None and not self.path.endswith((".csv", ".jsonl")):
            raise ValueError(f"`path` must be None or a file that ends in .csv or .jsonl. Received: path={path!r}.")
        self.picture = None if picture is None else os.fspath(picture)
        if self.picture is not None and not self.picture.endswith(_PICTURES):
            raise ValueError(
                f"`picture` must be None or a file that ends in {', '.join(_PICTURES)}. Received: {picture!r}."
            )
        if picture is not None and importlib.util.find_spec("matplotlib") is None:
            raise ImportError("`picture` needs matplotlib, which draws it. Run: pip install matplotlib")
        self.update_freq = update_freq if update_freq == "epoch" else arguments.count("update_freq", update_freq)
        # What it does at the end of a batch is one division: Keras need not wait for it.
        self.async_safe = True
        self.rows: list[dict[str, Any]] = []
        self._timeline = Timeline()
        self._warned = self._in_fit = self._evaluated_inside = False
        self._model: Any = None

    def set_model(self, model: Any) -> None:
        """Called by `fit` and by `evaluate`."""
        self._evaluated_inside = self._in_fit and self._model is model and is_running("fit", "evaluate", of=model)
        if self._evaluated_inside:
            return
        super().set_model(model)
        self._readings, self._in_fit = Readings(model), False
        self._names: list[Perplexed] = []

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        self._timeline.begin_fit(self.model)
        self._in_fit, self._begins = True, True
        self._start = time.perf_counter()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        self._timeline.begin_epoch(epoch, self._epochs_in_file)
        if self._begins:
            self._go_on()
            self._begins = False
        self._epoch = self._timeline.number(epoch)
        self._readings.restart()
        self._train: dict[str, Totals] = {}
        self._validation: dict[str, Totals] = {}

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes what the batches before have brought."""
        if batch and not self._names:
            self._names = self._readings.perplexed()
        if self._timeline.begin_batch(batch, self.update_freq):
            self._write("batches", self._new_values())

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds to what the progress bar shows."""
        self._timeline.end_batch(batch)
        self._add_bits(logs)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        if self._in_fit and not self._evaluated_inside:
            self._end_batches()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        if self._in_fit and not self._evaluated_inside:
            self._validation = self._readings.totals()
        self._evaluated_inside = False

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes the row of the epoch."""
        self._end_batches()
        self._timeline.end_epoch(epoch)
        self._add_bits(logs)
        values = {
            f"{prefix}{unit}": value
            for prefix, totals in (("", self._train), ("val_", self._validation))
            for unit, value in self._of_epoch(totals, prefix, logs or {}).items()
        }
        self._write("epoch", values)
        if not values and not self._warned:
            self._warned = True
            arguments.warn(NO_PERPLEXITY)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Draws the picture."""
        self._in_fit = False
        if self.picture is not None:
            try:
                self.draw(self.picture)
            except OSError as error:
                # What was trained is worth more than the picture.
                arguments.warn(f"The picture '{self.picture}' cannot be written: {error.strerror or error}.")

    def draw(self, picture: Any) -> None:
        """Draws the rows so far into a file, also after a run that was interrupted."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        curves = (
            ("batches", "perplexity", "train, batches", {"color": "C0", "alpha": 0.35, "lw": 1}),
            ("epoch", "perplexity", "train", {"color": "C0", "marker": "o"}),
            ("epoch", "val_perplexity", "validation", {"color": "C1", "marker": "o"}),
        )
        for of, column, label, style in curves:
            points = [(row["step"], row[column]) for row in self.rows if row["of"] == of and _drawable(row.get(column))]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, **style)
                axes.set_yscale("log")
        axes.set(xlabel="step", ylabel="perplexity")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            # On a logarithmic axis of perplexity bits are evenly spaced.
            axes.twinx().set(ylim=np.log2(axes.get_ylim()), ylabel="bits per token")
            axes.legend()
        os.makedirs(os.path.dirname(os.fspath(picture)) or ".", exist_ok=True)
        figure.savefig(picture, dpi=120)

    def _new_values(self):
        totals = self._readings.new_totals()
        return self._by_unit(lambda one: one.values(totals[one.name]))

    def _of_epoch(self, totals, prefix, logs):
        if prefix and not totals:
            return {}
        return self._by_unit(lambda one: one.values_of_epoch(totals.get(one.name), logs.get(f"{prefix}{one.name}")))

    def _by_unit(self, values):
        """The values of the first metric of perplexity, under the names of our columns."""
        for one in self._readings.perplexed()[:1]:
            found = values(one)
            names = {unit: one.name if unit == "perplexity" else one.named(unit) for unit in _UNITS}
            return {unit: found[name] for unit, name in names.items() if name in found}
        return {}

    def _add_bits(self, logs):
        for name in self._names:
            for prefix in ("", "val_"):
                value = (logs or {}).get(f"{prefix}{name.name}")
                if value is not None:
                    logs[f"{prefix}{name.named('bits_per_token')}"] = math.log2(value) if value > 0 else value

    def _end_batches(self):
        """The batches of an epoch have ended, and their metrics are still there."""
        if self._timeline.batches_ended:
            return
        self._names = self._readings.perplexed()
        if self._timeline.end_batches(self.update_freq):
            self._write("batches", self._new_values())
        self._train = self._readings.totals()

    # The file.

    def _write(self, of, values):
        # No tokens are in batches that were not there: where Keras does not know its length, data runs out.
        if not values or of == "batches" and not values["tokens"]:
            return
        seconds = round(time.perf_counter() - self._start, 3)
        row = {"of": of, "epoch": self._epoch, "step": self._timeline.steps, "seconds": seconds, **values}
        self.rows.append(row)
        if self.path is not None:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                self._write_row(file, row)

    def _write_row(self, file, row):
        if file.name.endswith((".jsonl", ".jsonl.part")):
            # JSON has no word for infinite and for none.
            row = {name: value if _is_finite(value) else str(value) for name, value in row.items()}
            file.write(json.dumps(row) + "\n")
        else:
            csv.DictWriter(file, _COLUMNS).writerow(row)

    def _go_on(self):
        """Keeps the rows of the training that goes on, and a file of another one under another name."""
        steps = self._timeline.steps
        known = self.rows or (self._rows_in_file() if steps else [])
        self.rows = [row for row in known if row.get("step", math.inf) <= steps]
        if self.path is None:
            return
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        if not self.rows and os.path.exists(self.path) and self._has_rows():
            os.replace(self.path, _free_name(self.path))
        # Under another name until it is whole.
        with open(f"{self.path}.part", "w", newline="", encoding="utf-8") as file:
            if self.path.endswith(".csv"):
                csv.DictWriter(file, _COLUMNS).writeheader()
            for row in self.rows:
                self._write_row(file, row)
        os.replace(f"{self.path}.part", self.path)

    def _rows_in_file(self) -> list[dict[str, Any]]:
        if self.path is None or not os.path.exists(self.path):
            return []
        lines = self._lines()
        # A process that was killed may have left half a row.
        lines = [line for line in lines if line.endswith("\n")]
        if self.path.endswith(".csv") and lines[:1] != [_HEADER]:
            return []
        try:
            rows = list(csv.DictReader(lines)) if self.path.endswith(".csv") else list(map(json.loads, lines))
            return [{name: _read(name, value) for name, value in row.items() if value != ""} for row in rows]
        except (AttributeError, TypeError, ValueError):
            # No log of ours. It is kept, under another name.
            return []

    def _lines(self):
        with open(self.path, newline="", encoding="utf-8", errors="replace") as file:
            return file.readlines()

    def _has_rows(self):
        return self._lines() not in ([], [_HEADER])

    def _epochs_in_file(self) -> Iterator[Epoch]:
        return (Epoch(row["epoch"], row["step"]) for row in self._rows_in_file() if row.get("of") == "epoch")


def _read(name, value):
    return value if name == "of" else int(value) if name in ("epoch", "step") else float(value)


def _is_finite(value):
    return isinstance(value, str) or math.isfinite(value)


def _free_name(path):
    stem, end = os.path.splitext(path)
    return next(name for i in itertools.count(1) if not os.path.exists(name := f"{stem}.{i}{end}"))


def _drawable(value):
    return value is not None and math.isfinite(value) and value > 0
