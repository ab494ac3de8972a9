"""Perplexity in the progress bar, in a file and as a picture, without TensorBoard."""

import importlib.util
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_xent import arguments
from keras_xent.callbacks._log_file import LogFile
from keras_xent.callbacks._timeline import Mark
from keras_xent.callbacks._training_log import Batches, Epoch, TrainingLog
from keras_xent.callbacks._units import sibling_tag, to_bits, to_nats
from keras_xent.metrics._token_mean import Totals

_UNITS = ("tokens", "nll", "perplexity", "bits_per_token")
_COLUMNS = ("kind", "epoch", "step", "iterations", "seconds", *_UNITS, *(f"val_{unit}" for unit in _UNITS))
_PICTURES = (".png", ".svg", ".pdf", ".jpg")
_NO_PERPLEXITY = (
    "No perplexity will be logged, since the model has no metric of it. Compile it with "
    "metrics=[keras_xent.metrics.Perplexity()]."
)


class PerplexityLogger(TrainingLog):
    """Logs the perplexity of training and validation, for people without TensorBoard.

    - The progress bar and the history get `bits_per_token` beside the perplexity.
    - A file gets a row at the end of each epoch, for each validation within an epoch and, if asked for, every few
      batches, over these batches. Each is written at once, so that an interrupted run loses none; half a row that a
      killed one leaves is passed over.
    - A picture at the end of training shows the perplexity of train and validation against the steps.

    Epochs and steps continue over several calls of `fit`, and in a new process that has loaded the model: rows of steps
    that are trained again are written again. A file of another training is kept under a name with a number.

    Needs `keras_xent.metrics.Perplexity` in the model; of several the first counts.

    Formula: `nll = sum_n t_n nll_n / sum_n t_n`, `perplexity = exp(nll)`, `bits = nll / ln 2`.

    Args:
        path: a file that ends in `.csv` or `.jsonl`, or None. Columns: `kind` ("epoch", "batches" or "validation"),
            `epoch` from 0, `step` in batches, `iterations` (the optimizer's count), `seconds` since `fit` began,
            valid `tokens`, `nll` in nats, `perplexity` and `bits_per_token`, and the same of validation with `val_`.
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
        self.rows: list[dict[str, Any]] = []
        self._warned = False
        # The names in the logs of perplexities, once the model has seen a batch.
        self._names: list[str] = []

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.Callback`."""
        super().on_train_begin(logs)
        self._names, self._start = [], time.perf_counter()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes what the batches before have brought."""
        super().on_train_batch_begin(batch, logs)
        if batch and not self._names:
            self._names = [one.name for one in self._reader.perplexities()]

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds to what the progress bar shows."""
        super().on_train_batch_end(batch, logs)
        self._add_bits(logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes the row of the epoch, and adds to the history."""
        super().on_epoch_end(epoch, logs)
        self._names = [one.name for one in self._reader.perplexities()]
        self._add_bits(logs)

    def _add_bits(self, logs):
        for name in self._names:
            for prefix in ("", "val_"):
                value = (logs or {}).get(f"{prefix}{name}")
                if value is not None:
                    logs[f"{prefix}{sibling_tag(name, 'bits_per_token')}"] = to_bits(to_nats(value))

    # What is written.

    def write_begin(self, mark: Mark) -> None:
        """Keeps the rows of the training that continues, and a file of another one under another name."""
        known = self.rows or (self._rows_in_file() if mark.step else [])
        self.rows = [row for row in known if row.get("step", np.inf) <= mark.step]
        if self.path is not None:
            LogFile(self.path, _COLUMNS).begin(self.rows)

    def write_batches(self, mark: Mark, batches: Batches) -> None:
        """Writes the row of these batches."""
        values = self._values(lambda one: one.units(batches.totals[one.name]))
        # No tokens are in batches that were not there: where Keras does not know its length, data runs out.
        if values and values["tokens"]:
            self._write("batches", mark, values)

    def write_epoch(self, epoch: Epoch) -> None:
        """Writes the row of the epoch."""
        values = self._values(lambda one: one.epoch_units(epoch.train.get(one.name), epoch.logs.get(one.name)))
        if any(name.startswith("val_") for name in epoch.logs):
            validated = self._values(
                lambda one: one.epoch_units(epoch.validation.get(one.name), epoch.logs.get(f"val_{one.name}"))
            )
            values |= {f"val_{unit}": value for unit, value in validated.items()}
        if values:
            self._write("epoch", epoch.mark, values)
        elif not self._warned:
            self._warned = True
            arguments.warn(_NO_PERPLEXITY)

    def write_validation(self, step: int, logs: dict[str, Any], totals: dict[str, Totals]) -> None:
        """Writes the row of a validation within an epoch. The row of the epoch has the one at its end."""
        values = self._values(lambda one: one.units(totals[one.name]))
        if values and not self._timeline.batches_ended:
            self._write("validation", Mark(step, None), {f"val_{unit}": value for unit, value in values.items()})

    def write_end(self, step: int, logs: dict[str, Any]) -> None:
        """Draws the picture."""
        if self.picture is not None:
            try:
                self.draw(self.picture)
            except OSError as error:
                # What was trained is worth more than the picture.
                arguments.warn(f"The picture '{self.picture}' cannot be written: {error.strerror or error}.")

    def read_marks(self) -> Iterator[Mark]:
        """The marks in the rows of the file."""
        for row in self._rows_in_file():
            if "iterations" in row:
                yield Mark(row["step"], row["iterations"], row["epoch"] if row.get("kind") == "epoch" else None)

    def _rows_in_file(self):
        return [] if self.path is None else LogFile(self.path, _COLUMNS).rows()

    def _values(self, units):
        """The values of the first metric of perplexity, under the names of the columns."""
        for one in self._reader.perplexities()[:1]:
            found = units(one)
            names = {unit: one.name if unit == "perplexity" else one.tag(unit) for unit in _UNITS}
            return {unit: found[name] for unit, name in names.items() if name in found}
        return {}

    def _write(self, kind, mark, values):
        seconds = round(time.perf_counter() - self._start, 3)
        place = {"kind": kind, "epoch": self._epoch, "step": mark.step, "iterations": mark.iterations}
        row = {**place, "seconds": seconds, **values}
        row = {name: value for name, value in row.items() if value is not None}
        self.rows.append(row)
        if self.path is not None:
            LogFile(self.path, _COLUMNS).append(row)

    # The picture.

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
            ("validation", "val_perplexity", "validation", {"color": "C1", "marker": "o"}),
        )
        for kind, column, label, style in curves:
            kinds = ("epoch", "validation") if kind == "validation" else (kind,)
            rows = [row for row in self.rows if row["kind"] in kinds]
            points = [(row["step"], row[column]) for row in rows if _is_drawable(row.get(column))]
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


def _is_drawable(value):
    return value is not None and np.isfinite(value) and value > 0
