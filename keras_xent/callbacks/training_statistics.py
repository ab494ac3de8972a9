"""Gradient norm, tokens per second and share of valid tokens in the logs that every callback sees."""

from typing import Any

from keras_xent import arguments
from keras_xent.callbacks._gradient_norm import GradientNorm
from keras_xent.callbacks._scalars import token_rates
from keras_xent.callbacks._timeline import Mark
from keras_xent.callbacks._training_log import Batches, Epoch, TrainingLog


class TrainingStatistics(TrainingLog):
    """Adds what TensorBoard shows of tokens and gradient to `logs`, for CSVLogger, wandb, MLflow and the progress bar.

    It must stand before the callbacks that are to see it. At the end of an epoch the logs get the values of the epoch;
    with `update_freq=n` those of a batch get the values of the last `n` batches, which are measured every `n` batches.
    Tokens are those of the first `keras_xent.metrics.Perplexity` of the model.

    Args:
        tokens_per_second: whether to add `tokens_per_second`, the valid tokens that are trained in a second.
        valid_share: whether to add `valid_share`, the valid tokens among all labels.
        gradient_norm: whether to add `gradient_norm`, of the last step before; needs a recompilation.
        update_freq: `"epoch"`, or after how many batches the logs of batches get new values.

    Raises:
        ValueError: an `update_freq` that is no number of batches; `gradient_norm` under `tf.distribute`, or on JAX of a
            model whose `metrics` are without Keras'.

    Warns once where tokens are asked for and the model has no metric that counts them.

    Example:

    >>> import keras
    >>> import keras_xent as kx
    >>> callbacks = [kx.callbacks.TrainingStatistics(gradient_norm=True), keras.callbacks.CSVLogger("log.csv")]
    """

    def __init__(
        self,
        *,
        tokens_per_second: bool = True,
        valid_share: bool = True,
        gradient_norm: bool = False,
        update_freq: Any = "epoch",
    ) -> None:
        super().__init__()
        self.tokens_per_second = arguments.boolean("tokens_per_second", tokens_per_second)
        self.valid_share = arguments.boolean("valid_share", valid_share)
        self.gradient_norm = arguments.boolean("gradient_norm", gradient_norm)
        self.update_freq = update_freq if update_freq == "epoch" else arguments.count("update_freq", update_freq)
        self._of_batches: dict[str, float] = {}
        self._warned = False

    def _follow(self, model):
        super()._follow(model)
        self._gradient_norm = GradientNorm.watching(model) if self.gradient_norm else None

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds the values of the batches before."""
        super().on_train_batch_end(batch, logs)
        if logs is not None:
            logs.update(self._of_batches)

    def write_begin(self, mark: Mark) -> None:
        """Forgets an earlier `fit`."""
        self._of_batches = {}

    def write_batches(self, mark: Mark, batches: Batches) -> None:
        """Measures these batches."""
        self._of_batches = self._values(batches.totals, batches.seconds)

    def write_epoch(self, epoch: Epoch) -> None:
        """Adds the values of the epoch."""
        epoch.logs.update(self._values(epoch.train, epoch.seconds))

    def _values(self, totals, seconds):
        values = {}
        perplexities = self._reader.perplexities()
        for name, value in token_rates(totals, perplexities, seconds).items():
            if name == "per_second" and self.tokens_per_second:
                values["tokens_per_second"] = value
            elif name != "per_second" and self.valid_share:
                values[name] = value
        if not perplexities and (self.tokens_per_second or self.valid_share) and not self._warned:
            self._warned = True
            arguments.warn(
                "No tokens will be counted, since the model has no metric that counts them. Compile it with "
                "metrics=[keras_xent.metrics.Perplexity()], or set tokens_per_second=False and valid_share=False."
            )
        if self._gradient_norm is not None:
            values["gradient_norm"] = self._gradient_norm.value(self._reader.model)
        return values
