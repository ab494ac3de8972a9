"""A fixed batch on which one can watch, token by token, what a model learns."""

import math
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_xent import arguments
from keras_xent.metrics import Perplexity

_MOST_SEQUENCES, _COLUMNS, _MOST_LINES, _WORST = 8, 8, 40, 20
# Inches for the text of a token. TensorBoard shows pictures about four inches wide.
_CELL = (0.55, 0.22)
_SIGNS = {"\n": "\u23ce", "\r": "\u240d", "\t": "\u21e5"}


class Loss(NamedTuple):
    """What a model makes of the tokens of a batch: arrays `[sequences, length]`."""

    nll: np.ndarray
    counts: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    # The cross-entropy of a model that knows nothing, ln of the number of classes.
    uniform: float


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
        self._decode, self._warned = decode, False

    def loss(self, model: Any, metric: Perplexity) -> Loss:
        """The loss of each token, and what the model would have said, counted as the metric counts."""
        y_pred = model(self.x, training=False)
        if not hasattr(y_pred, "shape"):
            raise ValueError(f"`probe` is for models with one output. This one returns a {type(y_pred).__name__}.")
        labels, weights = ops.convert_to_tensor(self.y), self.sample_weight
        nll, weights = metric.per_token(labels, y_pred, None if weights is None else ops.convert_to_tensor(weights))
        arrays = nll, ops.not_equal(weights, 0), labels, ops.argmax(y_pred, axis=metric.axis)
        nll, counts, labels, predicted = map(ops.convert_to_numpy, arrays)
        return Loss(nll, counts, labels, predicted, uniform=math.log(y_pred.shape[metric.axis]))

    def text(self, token: Any) -> str:
        """A token as people read it."""
        token, text = int(token), str(int(token))
        try:
            # A label that is ignored may be below 0.
            if self._decode is not None and token >= 0:
                text = str(self._decode(token) if callable(self._decode) else self._decode[token])
        except (IndexError, KeyError):
            pass
        # What the user's own function may raise is not known, and no reason to end the training.
        except Exception as error:
            if not self._warned:
                self._warned = True
                arguments.warn(f"`decode` failed for token {token}, which is shown as its number: {error!r}.")
        return "".join(map(_visible, text))

    def worst_tokens(self, loss: Loss) -> str:
        """A Markdown table of the tokens with the largest loss."""
        order = np.argsort(np.where(loss.counts, -loss.nll, np.inf), axis=None, kind="stable")
        lines = [
            "| nats | probability | token | predicted | before it | sequence | place |",
            "|--:|--:|---|---|---|--:|--:|",
        ]
        for index in order[: min(_WORST, int(loss.counts.sum()))]:
            row, place = np.unravel_index(index, loss.nll.shape)
            space = " " if self._decode is None else ""
            before = space.join(map(self.text, loss.labels[row, max(0, place - 8) : place].tolist()))
            nll = loss.nll[row, place]
            texts = (self.text(loss.labels[row, place]), self.text(loss.predicted[row, place]), before)
            cells = [f"{nll:.3f}", f"{np.exp(-nll):.2e}", *map(_cell, texts), str(row), str(place)]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def heat_maps(self, loss: Loss) -> np.ndarray:
        """A picture of each sequence, `[sequences, height, width, 3]` of uint8.

        The tokens on a ground that is the darker the larger their loss: black on white is certain, white on dark red as
        bad as if the model knew nothing.
        """
        places = int(np.flatnonzero(loss.counts.any(axis=0))[-1]) + 1 if loss.counts.any() else 1
        places = min(places, _COLUMNS * _MOST_LINES)
        return np.stack([self._heat_map(loss, row, places) for row in range(min(len(loss.nll), _MOST_SEQUENCES))])

    def _heat_map(self, loss, row, places):
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        lines = -(-places // _COLUMNS)
        width, height = _COLUMNS * _CELL[0] + 0.2, lines * _CELL[1] + 0.65
        figure = Figure(figsize=(width, height), dpi=100)
        axes = figure.add_axes((0.1 / width, 0.55 / height, 1 - 0.2 / width, 1 - 0.65 / height))
        axes.set(xlim=(0, _COLUMNS), ylim=(lines, 0))
        axes.axis("off")
        scale = ScalarMappable(Normalize(0, loss.uniform), colormaps["Reds"])
        for place in np.flatnonzero(loss.counts[row, :places]):
            line, column = divmod(int(place), _COLUMNS)
            nll, text = loss.nll[row, place], self.text(loss.labels[row, place])
            axes.add_patch(Rectangle((column, line), 1, 1, facecolor=scale.to_rgba(nll), edgecolor="white"))
            written = axes.text(column + 0.5, line + 0.5, text if len(text) <= 9 else f"{text[:8]}\u2026")
            ink = "white" if nll > 0.6 * loss.uniform else "black"
            written.set(color=ink, ha="center", va="center", fontsize=7, parse_math=False)
        bar = figure.add_axes((0.1 / width, 0.38 / height, 0.5, 0.1 / height))
        figure.colorbar(scale, cax=bar, orientation="horizontal").set_label("nats", size=7)
        bar.tick_params(labelsize=6)
        canvas = FigureCanvasAgg(figure)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _visible(character):
    if character in _SIGNS:
        return _SIGNS[character]
    # Controls, surrogates and the like, which no picture and no table can hold.
    return "\ufffd" if unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp") else character


def _cell(text):
    """The text in a cell of Markdown: nothing in it means anything, and its spaces are seen."""
    return "".join(c if c.isalnum() else "\u2423" if c == " " else f"&#{ord(c)};" if c.isascii() else c for c in text)
