"""A fixed batch on which one can watch, token by token, what a model learns."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_xent.callbacks._heat_map import Loss, heat_maps
from keras_xent.callbacks._token_text import TokenText
from keras_xent.metrics import Perplexity

_WORST, _CONTEXT = 20, 8


class Probe:
    """A batch `(x, y)` or `(x, y, sample_weight)` with labels `[sequences, length]`, and how its tokens are read.

    `decode` is a function from a token's number to its text, a list of texts, or a dict from number to text.
    """

    def __init__(self, batch: Any, decode: Callable[[int], str] | Sequence[str] | Mapping[int, str] | None) -> None:
        is_batch = isinstance(batch, tuple | list) and len(batch) in (2, 3)
        if not is_batch or np.ndim(batch[1]) != 2:
            came = f"labels of shape {np.shape(batch[1])}" if is_batch else f"a {type(batch).__name__}"
            raise ValueError(
                "`probe` must be a batch (x, y) or (x, y, sample_weight) with labels y of shape [sequences, length]. "
                f"Received: {came}."
            )
        self.x, self.y, self.sample_weight = (*batch, None)[:3]
        if isinstance(self.x, list) and not hasattr(self.x[0], "shape"):
            self.x = np.asarray(self.x)
        self.text = TokenText(decode)

    def loss(self, model: Any, metric: Perplexity) -> Loss:
        """The loss of each token, and what the model would have said, counted as the metric counts."""
        y_pred = model(self.x, training=False)
        if not hasattr(y_pred, "shape"):
            raise ValueError(f"`probe` is for models with one output. This one returns a {type(y_pred).__name__}.")
        labels, weights = ops.convert_to_tensor(self.y), self.sample_weight
        nll, weights = metric.per_token(labels, y_pred, None if weights is None else ops.convert_to_tensor(weights))
        arrays = nll, ops.not_equal(weights, 0), labels, ops.argmax(y_pred, axis=metric.axis)
        nll, valid, labels, predicted = map(ops.convert_to_numpy, arrays)
        return Loss(nll, valid, labels, predicted, uniform=math.log(y_pred.shape[metric.axis]))

    def write(self, loss: Any, writer: Any, epoch: int) -> None:
        """Writes what TensorBoard shows of the batch."""
        import tensorflow as tf

        with writer.as_default(epoch), tf.summary.record_if(True):
            tf.summary.histogram("token_nll", loss.nll[loss.valid], description="nats of each token of the probe")
            pictures = heat_maps(loss, self.text)
            tf.summary.image("tokens", pictures, max_outputs=len(pictures), description="dark: a large loss")
            tf.summary.text("worst_tokens", self.worst_tokens(loss))

    def worst_tokens(self, loss: Loss) -> str:
        """A Markdown table of the tokens with the largest loss."""
        space = _space_between({self.text(label) for label in np.unique(loss.labels[loss.valid])})
        order = np.argsort(np.where(loss.valid, -loss.nll, np.inf), axis=None, kind="stable")
        lines = [
            "| loss (nats) | probability | context | token | prediction | sequence | position |",
            "|--:|--:|---|---|---|--:|--:|",
        ]
        for index in order[: min(_WORST, int(loss.valid.sum()))]:
            row, position = np.unravel_index(index, loss.nll.shape)
            context = space.join(map(self.text, loss.labels[row, max(0, position - _CONTEXT) : position].tolist()))
            nll = loss.nll[row, position]
            texts = (context, self.text(loss.labels[row, position]), self.text(loss.predicted[row, position]))
            cells = [f"{nll:.3f}", f"{np.exp(-nll):.2e}", *map(_cell, texts), str(row), str(position)]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def _space_between(texts):
    """A space for words and numbers; nothing if the texts of the tokens have spaces, or signs for them, in them."""
    return "" if any(set(text) & set(" \u2581\u0120") for text in texts) else " "


def _cell(text):
    """The text in a cell of Markdown: nothing in it means anything, and its spaces are seen."""
    return "".join(c if c.isalnum() else "\u2423" if c == " " else f"&#{ord(c)};" if c.isascii() else c for c in text)
