"""The rows where cross-entropy goes wrong, with their losses and gradients in closed form.

Each table is one array, so that a kernel or a loss meets all its rows in one compiled program of each mode. A new loss
meets them by its name: see losses/test_edge_rows.py.
"""

from typing import NamedTuple

import numpy as np

INF, NAN = float("inf"), float("nan")
CLASSES = 7


class Rows(NamedTuple):
    """Labels and float32 logits, losses, and their gradients for the logits, by row; `counts` is for masks."""

    names: tuple[str, ...]
    labels: np.ndarray
    logits: np.ndarray
    losses: np.ndarray
    gradients: np.ndarray
    # Rows without anything infinite, huge or NaN. All others are to leave no trace where they are masked.
    counts: np.ndarray


def _wide(number):
    """The float64 value of a float32 number."""
    return float(np.float32(number))


def _softmax():
    e, others = np.exp(1.0), 6 * np.exp(-20.0)
    known = [0.2, 0.7, 0.02, 0.02, 0.02, 0.02, 0.02]
    # name, label, logits, loss, gradient: where fewer than 7 numbers are given, the last one goes on.
    rows = [
        ("equal logits", 3, [0], np.log(7), [1 / 7, 1 / 7, 1 / 7, -6 / 7, 1 / 7]),
        ("known probabilities", 1, np.log(known), -np.log(0.7), [0.2, -0.3, 0.02]),
        ("-inf on other classes", 0, [0, -INF, 1, -INF], np.log(1 + e), [-e / (1 + e), 0, e / (1 + e), 0]),
        ("right by e^20", 0, [20, 0], np.log1p(others), np.array([-others, *[others / 6] * 6]) / (1 + others)),
        ("wrong by 20", 1, [20, 0], 20 + np.log1p(others), [1 / (1 + others), -1, np.exp(-20.0)]),
        ("two of 30", 0, [30, 30, -INF], np.log(2), [-0.5, 0.5, 0]),
        ("right by 1e4", 0, [1e4, 0], 0, [0]),
        ("wrong by 2e4", 1, [1e4, -1e4, 0], 2e4, [1, -1, 0]),
        ("wrong by 2e30", 1, [1e30, -1e30, 0], 2 * _wide(1e30), [1, -1, 0]),
        ("two of 1e30", 0, [1e30, 1e30, -1e30], np.log(2), [-0.5, 0.5, 0]),
        ("-inf on the label", 1, [0, -INF, 1, -INF], INF, [1 / (1 + e), -1, e / (1 + e), 0]),
        ("+inf on the label", 0, [INF, 0, 1], 0, [0]),
        ("+inf on another class", 1, [INF, 0, 1], INF, [1, -1, 0]),
        ("two of +inf", 0, [INF, 0, INF], NAN, [NAN]),
        ("all -inf", 0, [-INF], NAN, [NAN]),
        ("NaN beside +inf", 2, [INF, NAN, 0], NAN, [NAN]),
    ]
    return _rows(rows, CLASSES, counts=6)


def _sigmoid():
    tiny = np.exp(-40.0)
    rows = [
        ("right with probability 0.9", 1, [np.log(9)], -np.log(0.9), [-0.1]),
        ("wrong with probability 0.9", 0, [np.log(9)], -np.log(0.1), [0.9]),
        ("undecided", 1, [0], np.log(2), [-0.5]),
        ("right by 40", 1, [40], tiny, [-tiny]),
        ("right by -40", 0, [-40], tiny, [tiny]),
        ("wrong by 40", 0, [40], 40, [1]),
        ("wrong by -40", 1, [-40], 40, [-1]),
        ("right by 1e4", 1, [1e4], 0, [0]),
        ("wrong by 1e4", 0, [1e4], 1e4, [1]),
        ("right by 1e30", 0, [-1e30], 0, [0]),
        ("wrong by 1e30", 1, [-1e30], _wide(1e30), [-1]),
        ("right by inf", 1, [INF], 0, [0]),
        ("right by -inf", 0, [-INF], 0, [0]),
        ("wrong by inf", 0, [INF], INF, [1]),
        ("wrong by -inf", 1, [-INF], INF, [-1]),
        ("NaN", 1, [NAN], NAN, [NAN]),
    ]
    return _rows(rows, 1, counts=7)


def _rows(rows, classes, counts):
    names, labels, logits, losses, gradients = zip(*rows, strict=True)

    def filled(numbers):
        return np.array([*numbers, *[numbers[-1]] * (classes - len(numbers))], "float64")

    return Rows(
        names,
        np.array(labels),
        np.stack([filled(row) for row in logits]).astype("float32"),
        np.array(losses, "float64"),
        np.stack([filled(row) for row in gradients]),
        np.arange(len(rows)) < counts,
    )


# 16 rows of 7 classes, and 16 binary labels `[16, 1]`.
SOFTMAX = _softmax()
SIGMOID = _sigmoid()


def assert_are(rows, losses, gradients, rtol=1e-6):
    """That losses `[16]` and gradients are those of the rows; where there is no limit, a gradient has a NaN."""
    np.testing.assert_allclose(losses, rows.losses, rtol=rtol, err_msg=", ".join(rows.names))
    for name, found, expected in zip(rows.names, gradients, rows.gradients, strict=True):
        if np.isnan(expected).any():
            assert np.isnan(found).any(), name
        else:
            np.testing.assert_allclose(found, expected, rtol=rtol, err_msg=name)


# Labels that some type of number rounds, or holds as its last: bfloat16 counts to 256 in steps of 1, float16 to 2048
# and no further than 65504.
EDGE_LABELS = np.array([0, 1, 127, 128, 255, 256, 257, 599, 2047, 2049, 4099, 32767, 32768, 50257, 65535, 65536])
EDGE_CLASSES = 65537


def edge_labels():
    """Labels `[16]`, float32 logits `[16, 65537]`, the one loss of all rows, and the gradient for a label's logit.

    Of two classes: the label has logit 1, one other class 0, and all others -1e4.
    """
    rows, labels = np.arange(len(EDGE_LABELS)), EDGE_LABELS
    logits = np.full((len(labels), EDGE_CLASSES), -1e4, "float32")
    logits[rows, labels], logits[rows, (labels + 12_345) % EDGE_CLASSES] = 1.0, 0.0
    return labels, logits, np.log1p(np.exp(-1.0)), -1 / (1 + np.e)
