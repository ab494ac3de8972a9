"""TensorBoard logs of perplexity."""

import math
from typing import Any

import keras

from keras_xent.losses.base import warn


class TensorBoard(keras.callbacks.TensorBoard):
    """`keras.callbacks.TensorBoard`, with the likelihood in all its units.

    A model compiled with `keras_xent.metrics.Perplexity` gets `epoch_perplexity`, `epoch_nll` (nats per token) and
    `epoch_bits_per_token`, each in the runs `train` and `validation`, so that TensorBoard draws both curves into one
    chart. All arguments are those of `keras.callbacks.TensorBoard`.

    Formula: `nll = ln(perplexity)`, `bits = nll / ln 2`.

    Example:

    >>> import keras_xent as kx
    >>> callback = kx.callbacks.TensorBoard("logs", update_freq="epoch")

    Then `model.fit(..., callbacks=[callback])`, and `tensorboard --logdir logs` shows the curves.
    """

    _warned = False

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Writes the epoch's values; see `keras.callbacks.TensorBoard`."""
        logs = dict(logs or {})
        perplexities = [name for name in logs if name.endswith("perplexity")]
        if not perplexities and not self._warned:
            self._warned = True
            warn(
                "No perplexity will be logged, since no metric of the model has a name that ends in 'perplexity'. "
                "Compile it with metrics=[keras_xent.metrics.Perplexity()], whose name is that unless you give another."
            )
        for name in perplexities:
            value = float(logs[name])
            nll = math.log(value) if value > 0 else math.nan
            stem = name.removesuffix("perplexity")
            logs[f"{stem}nll"] = nll
            logs[f"{stem}bits_per_token"] = nll / math.log(2)
        super().on_epoch_end(epoch, logs)
