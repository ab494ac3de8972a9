"""TensorBoard logs of losses and perplexity."""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras

from keras_xent import _keras, arguments
from keras_xent.callbacks import _dashboards, _scalars
from keras_xent.callbacks._gradient_norm import GradientNorm
from keras_xent.callbacks._probe import Probe
from keras_xent.callbacks._run_writers import RunWriters, keras_sets_default, writing_epochs_only
from keras_xent.callbacks._timeline import Mark
from keras_xent.callbacks._training_log import Batches, Epoch, TrainingLog
from keras_xent.metrics._token_mean import Totals


class TensorBoard(TrainingLog, keras.callbacks.TensorBoard):
    """`keras.callbacks.TensorBoard` with batches of their own, exact perplexity, and steps that continue.

    A drop-in with all its arguments and tags (`epoch_loss`, `batch_loss`, `epoch_perplexity`, ...). What differs:

    - A `batch_` value is of the batches since the last that was written, not the mean since the epoch began.
    - Steps are batches. They and the epochs continue over several calls of `fit`, and in a new process that has loaded
      the model and has the same `log_dir`, also where loss scaling skips updates.
    - `evaluate` outside of `fit` writes into a run of its own, `evaluation`.
    - A step that writes nothing does not wait for the device, and what was written is in the files however a run ends.

    What it adds, all at steps, so that training and validation share an axis:

    - `units/nll`, the loss of train and validation in nats per token, and `gap/nll`, validation less train;
    - `tokens/per_second`, `tokens/valid_share` (valid tokens among all labels), and for each epoch `tokens/valid`;
    - `optimizer/learning_rate`, and with `gradient_norm=True` `optimizer/gradient_norm`;
    - a page of charts, a table of the settings of runs, and what `probe` shows.

    Tokens and nats need a `keras_xent.metrics.Perplexity` in the model. Formula: `nll = sum_n t_n nll_n / sum_n t_n`
    over valid tokens `n` with weights `t_n`, `perplexity = exp(nll)`.

    Args:
        log_dir: the folder of the logs.
        update_freq: `"epoch"`, `"batch"`, or after how many batches values are written.
        histogram_freq, embeddings_freq: after how many epochs histograms of weights, and embeddings, are written.
        write_graph, write_images, write_steps_per_second: whether to write these (images: of the weights).
        profile_batch, embeddings_metadata: the batch, or range of batches, to profile; files of labels by layer.
        gradient_norm: whether to write the norm of the gradient of the last step; needs a recompilation.
        probe: a fixed batch `(x, y)` or `(x, y, sample_weight)`, labels `[sequences, length]`, of which the run
            `probe` shows after each epoch a histogram of the tokens' losses, a picture of the tokens whose background
            is darker where the loss is larger, and a table of the worst.
        probe_freq: after how many epochs.
        decode: how tokens are read: a function from number to text, a list of texts, or a dict.
        hparams: more settings for the table of runs: a dict, or the `HyperParameters` of KerasTuner. What is no number,
            string or bool is written as text.

    Raises:
        ImportError: TensorBoard, TensorFlow or, for `probe`, Matplotlib is not installed.
        ValueError: `probe` is not a batch of sequences, `hparams` not a dict, or `gradient_norm` under `tf.distribute`,
            or on JAX of a model whose `metrics` are without Keras'.

    Example:

    >>> import keras_xent as kx
    >>> callback = kx.callbacks.TensorBoard("logs", update_freq=10)

    Then `model.fit(..., callbacks=[callback])`, and `tensorboard --logdir logs` shows the curves.
    """

    write_graph: bool
    write_steps_per_second: bool

    def __init__(
        self,
        log_dir: Any = "logs",
        histogram_freq: int = 0,
        write_graph: bool = True,
        write_images: bool = False,
        write_steps_per_second: bool = False,
        update_freq: Any = "epoch",
        profile_batch: Any = 0,
        embeddings_freq: int = 0,
        embeddings_metadata: Any = None,
        *,
        gradient_norm: bool = False,
        probe: Any = None,
        probe_freq: int = 1,
        decode: Callable[[int], str] | Sequence[str] | Mapping[int, str] | None = None,
        hparams: Any = None,
    ) -> None:
        needed = {"tensorboard": "to read it", "tensorflow": "which writes its files"}
        if probe is not None:
            needed["matplotlib"] = "which draws the probe"
        for package, why in needed.items():
            if importlib.util.find_spec(package) is None:
                raise ImportError(f"The logs of TensorBoard need {package}, {why}. Run: pip install {package}")
        super().__init__(
            log_dir,
            histogram_freq,
            write_graph,
            write_images,
            write_steps_per_second,
            update_freq,
            profile_batch,
            embeddings_freq,
            embeddings_metadata,
        )
        # Keras then need not wait for the logs of each batch, which are not used here.
        self._profiles = bool(profile_batch)
        self.async_safe = not self._profiles
        self.gradient_norm = arguments.boolean("gradient_norm", gradient_norm)
        self.probe = None if probe is None else Probe(probe, decode)
        self.probe_freq = arguments.count("probe_freq", probe_freq)
        self.hparams = hparams
        _dashboards.mapping_of(hparams)
        self._graph_drawn_of: Any = None
        self._writers_by_run: RunWriters | None = None
        self._keras_has_begun = False
        self._takes_summaries = False

    @property
    def _runs(self) -> RunWriters:
        if self._writers_by_run is None or self._writers_by_run.folder != self.log_dir:
            self._writers_by_run = RunWriters(self.log_dir)
        return self._writers_by_run

    @property
    def _train_writer(self) -> Any:
        # The only private name of Keras' callback here, which writes histograms, the graph and profiles through it: two
        # files that grow in one folder would hide one another.
        return self._runs.writer("train")

    def _follow(self, model):
        # A call that was interrupted has left files open.
        self._end_keras()
        self._runs.close()
        super()._follow(model)
        self._first_batch_pending = False
        self._gradient_norm = GradientNorm.watching(model) if self.gradient_norm else None

    # Training.

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.TensorBoard`."""
        super().on_train_begin(logs)
        self._first_batch_pending = True
        self._takes_summaries = self.update_freq != "epoch" and not keras_sets_default()
        # Not when `set_model` is called, which `evaluate` does too: this draws the graph, and so makes a run `train`.
        model, write_graph = self._reader.model, self.write_graph
        self.write_graph = write_graph and self._graph_drawn_of is not model
        with self.summary.record_if(True):
            keras.callbacks.TensorBoard.set_model(self, model)
        self.write_graph, self._graph_drawn_of = write_graph, model
        if self._profiles:
            with writing_epochs_only(self):
                keras.callbacks.TensorBoard.on_train_begin(self, logs)
            self._keras_has_begun = True

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes what the batches before have brought; see `keras.callbacks.TensorBoard`."""
        super().on_train_batch_begin(batch, logs)
        if self._first_batch_pending and batch:
            self._write_dashboards()
        if self._profiles:
            with writing_epochs_only(self):
                keras.callbacks.TensorBoard.on_train_batch_begin(self, batch, logs)
        if self._takes_summaries:
            # For summaries that layers of the user write.
            step = self._timeline.steps + 1
            self._runs.make_default("train", step, step % self.update_freq == 0)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.TensorBoard`."""
        super().on_train_batch_end(batch, logs)
        if self._profiles:
            # What it would write beside the profile is written here with the batches.
            writes, self.write_steps_per_second = self.write_steps_per_second, False
            keras.callbacks.TensorBoard.on_train_batch_end(self, batch, None)
            self.write_steps_per_second = writes

    def _end_batches(self):
        self._runs.end_default()
        super()._end_batches()
        if self._first_batch_pending:
            self._write_dashboards()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.TensorBoard`."""
        super().on_train_end(logs)
        self._end_keras()
        self._runs.close()

    def _end_keras(self):
        self._runs.end_default()
        if self._keras_has_begun:
            with writing_epochs_only(self):
                keras.callbacks.TensorBoard.on_train_end(self)
            self._keras_has_begun = False

    # Evaluation.

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.TensorBoard`."""
        self._runs.end_default()
        self._takes_summaries = self.update_freq != "epoch" and not keras_sets_default()
        super().on_test_begin(logs)

    def on_test_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.TensorBoard`."""
        if self._takes_summaries:
            run = "validation" if self._in_fit and self._evaluated is None else "evaluation"
            self._runs.make_default(run, batch + 1, (batch + 1) % self.update_freq == 0)

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Writes into the run `evaluation` if `evaluate` was called by itself; see `keras.callbacks.TensorBoard`."""
        self._runs.end_default()
        super().on_test_end(logs)

    # What is written.

    def read_marks(self) -> Iterator[Mark]:
        """The marks that an earlier process has written."""
        return _scalars.marks_in_events(os.path.join(self.log_dir, "train"))

    def write_batches(self, mark: Mark, batches: Batches) -> None:
        """Writes the values of these batches, at their last step."""
        written = _scalars.of_batches(batches, self._reader.perplexities())
        written |= {f"optimizer/{name}": rate for name, rate in _scalars.learning_rates(self._reader.model).items()}
        if self._gradient_norm is not None:
            written["optimizer/gradient_norm"] = self._gradient_norm.value(self._reader.model)
        if self.write_steps_per_second:
            written["batch_steps_per_second"] = batches.steps / batches.seconds
        self._runs.write("train", [_scalars.summary(written), _scalars.mark_summary(mark)], mark.step)
        self._runs.flush()

    def write_epoch(self, epoch: Epoch) -> None:
        """Writes Keras' values at the number of the epoch, and ours at its last step."""
        train, validation = _scalars.of_logs(epoch.logs)
        train |= {f"epoch_{name}": rate for name, rate in _scalars.learning_rates(self._reader.model).items()}
        if self.write_steps_per_second and epoch.seconds:
            train["epoch_steps_per_second"] = epoch.steps / epoch.seconds
        self._runs.write("train", [_scalars.summary(train)], epoch.number)
        if validation:
            self._runs.write("validation", [_scalars.summary(validation)], epoch.number)
        ours, validation = _scalars.of_epoch(epoch, self._reader.perplexities(), self.update_freq != "epoch")
        self._runs.write("train", [_scalars.summary(ours), _scalars.mark_summary(epoch.mark)], epoch.mark.step)
        if validation:
            self._runs.write("validation", [_scalars.summary(validation)], epoch.mark.step)
        # Without logs Keras writes histograms and embeddings only.
        with self.summary.record_if(True):
            keras.callbacks.TensorBoard.on_epoch_end(self, epoch.number, None)
        self._write_probe(epoch.number)
        self._runs.flush()

    def write_validation(self, step: int, logs: dict[str, Any], totals: dict[str, Totals]) -> None:
        """Writes Keras' values of a validation and its nats, at the step after which it was made."""
        written = _scalars.of_evaluation(logs) | _scalars.nats(totals, self._reader.perplexities())
        self._runs.write("validation", [_scalars.summary(written)], step)
        self._runs.flush()

    def write_evaluation(self, step: int, logs: dict[str, Any], totals: dict[str, Totals]) -> None:
        """Writes the values of an `evaluate` that is no validation."""
        self._runs.write("evaluation", [_scalars.summary(_scalars.of_evaluation(logs))], step)
        self._runs.flush()
        if not self._in_fit:
            self._runs.close()

    def write_end(self, step: int, logs: dict[str, Any]) -> None:
        """Writes the results of the run beside its settings."""
        names = {one.name for one in self._reader.perplexities()} or {"loss"}
        final = {f"final/{key}": value for key, value in logs.items() if key.removeprefix("val_") in names}
        self._runs.write("", [_scalars.summary(final), _dashboards.finished()], step)

    def _write_dashboards(self):
        # The metrics have their names once the model has seen a batch.
        self._first_batch_pending = False
        names = [name for name, _ in self._reader.metrics()]
        page = _dashboards.page(names, self._reader.perplexities(), self.update_freq != "epoch", self.gradient_norm)
        summaries = [page]
        if not _dashboards.has_settings(self.log_dir):
            model, more = self._reader.model, _dashboards.mapping_of(self.hparams)
            with _keras.training_state(model):
                settings = _dashboards.settings(model, self.params or {}, more)
            summaries.append(_dashboards.begun(settings))
        self._runs.write("", summaries)
        self._runs.flush()

    def _write_probe(self, epoch):
        perplexities = self._reader.perplexities()
        if self.probe is None or epoch % self.probe_freq or not perplexities:
            return
        try:
            loss = self.probe.loss(self._reader.model, perplexities[0].metric)
        except ValueError as error:
            # The training is worth more than the picture.
            arguments.warn(f"The probe is left out: {error}")
            self.probe = None
            return
        self.probe.write(loss, self._runs.writer("probe"), epoch)
