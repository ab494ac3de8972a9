"""TensorBoard logs of perplexity."""

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from keras_xent import arguments
from keras_xent.callbacks import dashboards
from keras_xent.callbacks.gradient_norm import GradientNorm
from keras_xent.callbacks.probe import Probe
from keras_xent.callbacks.readings import NO_PERPLEXITY, Readings, in_units, is_running
from keras_xent.callbacks.runs import Runs
from keras_xent.callbacks.timeline import Timeline, epochs_in_events
from keras_xent.metrics._token_mean import Totals


class TensorBoard(Runs):
    """`keras.callbacks.TensorBoard`, with a perplexity that is right, in steps that go on.

    A drop-in with all its arguments. What it adds, for each `keras_xent.metrics.Perplexity` of the model:

    - at the end of an epoch `epoch_perplexity`, `epoch_nll` (nats per token), `epoch_bits_per_token` and `epoch_tokens`
      in the runs `train` and `validation`, so that both are in one chart, and `epoch_generalization_gap`, the nats of
      validation less those of train;
    - with `update_freq="batch"` or a number, `batch_*` of every metric **over the batches since the last that was
      written**, not since the beginning of the epoch; of the perplexity also `batch_nll`, `batch_valid_share` (of the
      labels, how many count) and `tokens_per_second` (those that count), and `batch_learning_rate`;
    - a page of charts, a table of runs with the settings of loss and optimizer, and what `probe` shows.

    Steps are batches as the optimizer counts them. They and the epochs go on over several calls of `fit`, and in a new
    process where the optimizer was loaded and `log_dir` is the same. `evaluate` outside of `fit` writes into a run of
    its own, `evaluation`. A step that writes nothing does not wait for the device. What was written is in the files,
    however a run ends.

    Formula: `nll = sum_n t_n nll_n / sum_n t_n`, `perplexity = exp(nll)`, `bits = nll / ln 2`.

    Args:
        log_dir, histogram_freq, write_graph, write_images, write_steps_per_second, update_freq, profile_batch,
            embeddings_freq, embeddings_metadata: as in `keras.callbacks.TensorBoard`.
        gradient_norm: whether to write `batch_gradient_norm`, of the last step before; needs a recompilation.
        probe: a fixed batch `(x, y)` or `(x, y, sample_weight)`, labels `[sequences, length]`, whose tokens are looked
            at after each epoch, in the run `probe`: a histogram of their losses, a picture of the tokens on a ground
            that is the darker the larger the loss, and a table of the worst.
        probe_freq: after how many epochs.
        decode: how tokens are read: a function from number to text, a list of texts, or a dict.
        hparams: more settings for the table of runs.

    Raises:
        ImportError: TensorBoard, TensorFlow or, for `probe`, Matplotlib is not installed.
        ValueError: a `probe` that is no batch of sequences; under `tf.distribute`, `gradient_norm`.

    Example:

    >>> import keras_xent as kx
    >>> callback = kx.callbacks.TensorBoard("logs", update_freq=10)

    Then `model.fit(..., callbacks=[callback])`, and `tensorboard --logdir logs` shows the curves.
    """

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
        hparams: dict[str, Any] | None = None,
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
        # Keras then lets training go on while logs come from the device. Here they come to no use.
        self.async_safe = not (profile_batch or write_steps_per_second)
        self.gradient_norm = GradientNorm() if arguments.boolean("gradient_norm", gradient_norm) else None
        self.probe = None if probe is None else Probe(probe, decode)
        self.probe_freq = arguments.count("probe_freq", probe_freq)
        self.hparams = dict(hparams or {})
        self._draws_graph = write_graph
        self._timeline = Timeline()
        self._drawn_graph_of: Any = None
        self._warned = self._in_fit = self._evaluated_inside = self._begins = False
        self._model: Any = None

    def set_model(self, model: Any) -> None:
        """Called by `fit` and by `evaluate`; ends what an interrupted call has left."""
        self._evaluated_inside = self._in_fit and self._model is model and is_running("fit", "evaluate", of=model)
        if self._evaluated_inside:
            return
        self._end_runs()
        # Keras would draw the graph, and so make a run `train`, for `evaluate` too.
        self.write_graph = False
        super().set_model(model)
        self.write_graph = self._draws_graph
        self._in_fit = False
        self._readings = Readings(model)
        self._begin_epoch()
        if self.gradient_norm is not None:
            self.gradient_norm = GradientNorm.watching(model)

    @property
    def _train_writer(self):
        return self._writer("train")

    @property
    def _val_writer(self):
        return self._writer("validation" if self._in_fit and not self._evaluated_inside else "evaluation")

    # Training.

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.TensorBoard`."""
        self._in_fit, self._begins = True, True
        if self.write_graph and self._drawn_graph_of is not self._model:
            self._write_keras_model_summary()
            self._drawn_graph_of = self._model
        super().on_train_begin(logs)
        self._timeline.begin_fit(self._model)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.TensorBoard`."""
        self._timeline.begin_epoch(epoch, lambda: epochs_in_events(self._train_dir))
        self._begin_epoch()
        super().on_epoch_begin(epoch, logs)

    def _begin_epoch(self):
        self._readings.restart()
        self._train_totals: dict[str, Totals] = {}
        self._validation_totals: dict[str, Totals] = {}
        self._clock = time.perf_counter()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes what the batches before have brought: at their end Keras would make the device wait for the logs."""
        if self._timeline.begin_batch(batch, self.update_freq):
            self._write_batches()
        if self._begins and batch:
            self._write_dashboards()
        self._global_train_batch = self._timeline.steps
        super().on_train_batch_begin(batch, logs)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.TensorBoard`."""
        self._timeline.end_batch(batch)
        if not self.async_safe:
            super().on_train_batch_end(batch, None)

    def _write_batches(self):
        totals, now = self._readings.new_totals(), time.perf_counter()
        if totals and not any(new.labels for new in totals.values()):
            # The data has run out where Keras did not know its length.
            return
        seconds, self._clock = now - self._clock, now
        written = {f"batch_{name}": value for name, value in self._readings.new_values().items()}
        for one in self._readings.perplexed():
            new = totals[one.name]
            of_batch = one.values(new)
            tokens = of_batch.pop(one.named("tokens"))
            of_batch[one.named("valid_share")] = new.tokens / new.labels if new.labels else np.nan
            written.update({f"batch_{name}": value for name, value in of_batch.items()})
            written.setdefault("tokens_per_second", tokens / seconds)
        rates = self._collect_learning_rate({})
        written.update({f"batch_{name}": value for name, value in rates.items()})
        if self.gradient_norm is not None:
            written["batch_gradient_norm"] = self.gradient_norm.value()
        self._write_scalars("train", written, self._timeline.steps)
        self._flush()

    def _end_batches(self):
        """The batches of an epoch have ended, and their metrics are still there."""
        if self._timeline.batches_ended:
            return
        self._readings.wait()
        if self._timeline.end_batches(self.update_freq):
            self._write_batches()
        if self._begins:
            self._write_dashboards()
        self._train_totals = self._readings.totals()

    def _write_dashboards(self):
        # The metrics have their names once a batch has been seen.
        self._begins = False
        perplexed = self._readings.perplexed()
        settings = dashboards.hparams(self._model, self.params or {}, self.hparams)
        self._write_raw("", [dashboards.layout(perplexed), *dashboards.hparams_summaries(settings, perplexed)])

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes the epoch's values; see `keras.callbacks.TensorBoard`."""
        self._end_batches()
        logs, number = dict(logs or {}), self._timeline.number(epoch)
        perplexed = self._readings.perplexed()
        self._name_units(logs, perplexed)
        for one in perplexed:
            train = one.values_of_epoch(self._train_totals.get(one.name), logs.get(one.name))
            logs.update(train)
            if f"val_{one.name}" in logs and train:
                totals = self._validation_totals.get(one.name)
                validation = one.values_of_epoch(totals, logs[f"val_{one.name}"])
                logs.update({f"val_{name}": value for name, value in validation.items()})
                gap = validation[one.named("nll")] - train[one.named("nll")]
                logs[f"val_{one.named('generalization_gap')}"] = gap
        logs["iterations"] = self._timeline.end_epoch(epoch).steps
        # Keras would leave the epoch out where its last step is none that writes.
        with self.summary.record_if(True):
            super().on_epoch_end(number, logs)
        if self.probe is not None and number % self.probe_freq == 0 and perplexed:
            self._write_probe(self.probe, perplexed[0].metric, number)
        self._flush()

    def _name_units(self, logs, perplexed):
        """The units of perplexities that are not ours, and a warning if there is none at all."""
        foreign = [name for name in logs if name.endswith("perplexity")] if not perplexed else []
        for name in foreign:
            logs.update(in_units(name, logs[name]))
        if not perplexed and not foreign and not self._warned:
            self._warned = True
            arguments.warn(NO_PERPLEXITY)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.TensorBoard`."""
        names = {f"{prefix}{one.name}" for one in self._readings.perplexed() for prefix in ("", "val_")}
        final = {name: value for name, value in (logs or {}).items() if name in names}
        self._write_scalars("", final, self._timeline.steps)
        self._write_raw("", [dashboards.finished()])
        super().on_train_end(logs)
        self._end_runs()
        self._in_fit = False

    # Evaluation.

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """See `keras.callbacks.TensorBoard`."""
        if self._in_fit and not self._evaluated_inside:
            self._end_batches()
        super().on_test_begin(logs)

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Writes into the run `evaluation` if `evaluate` was called by itself; see `keras.callbacks.TensorBoard`."""
        totals, logs = self._readings.totals(), dict(logs or {})
        for one in self._readings.perplexed():
            logs.update(one.values(totals[one.name]))
        with self.summary.record_if(True):
            super().on_test_end(logs)
        if self._evaluated_inside:
            self._evaluated_inside = False
        elif self._in_fit:
            self._validation_totals = totals
        else:
            self._end_runs()

    # The probe.

    def _write_probe(self, probe, metric, epoch):
        try:
            loss = probe.loss(self._model, metric)
        except ValueError as error:
            # The training is worth more than the picture.
            arguments.warn(f"The probe is left out: {error}")
            self.probe = None
            return
        with self._writer("probe").as_default(epoch), self.summary.record_if(True):
            self.summary.histogram("token_nll", loss.nll[loss.counts], description="nats of each token of the probe")
            pictures = probe.heat_maps(loss)
            self.summary.image("tokens", pictures, max_outputs=len(pictures), description="dark: a large loss")
            self.summary.text("worst_tokens", probe.worst_tokens(loss))
