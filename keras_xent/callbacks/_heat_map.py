"""Pictures of tokens on grounds that are the darker the larger their loss."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

_MOST_SEQUENCES, _COLUMNS, _MOST_LINES = 8, 6, 34
# Inches for the text of a token, at 100 dots an inch. TensorBoard shows a picture about 330 dots wide.
_CELL = (0.6, 0.26)
_MOST_CHARACTERS = 7


class Loss(NamedTuple):
    """The tokens of a batch as a model sees them: arrays `[sequences, length]`."""

    nll: np.ndarray
    # Which tokens are valid: neither padding nor masked.
    valid: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    # The cross-entropy of a model that knows nothing, ln of the number of classes.
    uniform: float


def heat_maps(loss: Loss, text: Callable[[Any], str]) -> np.ndarray:
    """A picture of each sequence, `[sequences, height, width, 3]` of uint8.

    Black on white is certain, white on dark red as bad as a uniform distribution over the classes.
    """
    positions = int(np.flatnonzero(loss.valid.any(axis=0))[-1]) + 1 if loss.valid.any() else 1
    positions = min(positions, _COLUMNS * _MOST_LINES)
    return np.stack([_heat_map(loss, text, row, positions) for row in range(min(len(loss.nll), _MOST_SEQUENCES))])


def _heat_map(loss, text, row, positions):
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    lines = -(-positions // _COLUMNS)
    width, height = _COLUMNS * _CELL[0] + 0.1, lines * _CELL[1] + 0.6
    figure = Figure(figsize=(width, height), dpi=100)
    axes = figure.add_axes((0.05 / width, 0.55 / height, 1 - 0.1 / width, 1 - 0.6 / height))
    axes.set(xlim=(0, _COLUMNS), ylim=(lines, 0))
    axes.axis("off")
    scale = ScalarMappable(Normalize(0, loss.uniform), colormaps["Reds"])
    for position in np.flatnonzero(loss.valid[row, :positions]):
        line, column = divmod(int(position), _COLUMNS)
        nll, token = loss.nll[row, position], text(loss.labels[row, position])
        axes.add_patch(Rectangle((column, line), 1, 1, facecolor=scale.to_rgba(nll), edgecolor="white"))
        token = token if len(token) <= _MOST_CHARACTERS else f"{token[: _MOST_CHARACTERS - 1]}\u2026"
        written = axes.text(column + 0.5, line + 0.52, token)
        ink = "white" if nll > 0.6 * loss.uniform else "black"
        written.set(color=ink, ha="center", va="center", fontsize=9.5, parse_math=False)
    bar = figure.add_axes((0.15 / width, 0.4 / height, 0.6, 0.1 / height))
    figure.colorbar(scale, cax=bar, orientation="horizontal").set_label("loss (nats)", size=8, labelpad=1)
    bar.tick_params(labelsize=8, pad=1)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
