"""Sigmoid cross-entropy of binary and of many independent labels.

With logit `x`, label `y` in [0, 1] and `L = log(1 + exp(-|x|))`, the two costs are `softplus(-x) = max(-x, 0) + L` for
a positive and `softplus(x) = max(x, 0) + L` for a negative label: nothing overflows and nothing cancels.
"""

import math
from typing import Any

from keras import ops

from keras_xent.kernels import targets as _targets
from keras_xent.kernels._compile import as_written, compiled, differentiable
from keras_xent.kernels._rows import compiled_by_rows, selected, times


@as_written
def sigmoid_cross_entropy(
    labels: Any,
    logits: Any,
    *,
    axis: int | None = None,
    mask: Any = None,
    ignore_class: float | None = None,
    label_smoothing: float = 0.0,
    pos_weight: Any = None,
    focal_gamma: float = 0.0,
    focal_alpha: float | None = None,
) -> Any:
    """Cross-entropy of independent binary labels under the sigmoid of the logits.

    For one yes-or-no answer, and for many at once (multi-label), some of which may be missing. Labels get a gradient
    too, if something asks for it.

    Formula, for smoothing `s`, `y' = y (1 - s) + s / 2`, positive weight `w`:
    `w y' softplus(-x) + (1 - y') softplus(x)`; if focal, times `u^gamma` with `u = y' (1 - p) + (1 - y') p`, and times
    `alpha y' + (1 - alpha) (1 - y')`.

    Equivalent to (without options):

        loss = keras.ops.maximum(x, 0) - x * y + keras.ops.log1p(keras.ops.exp(-keras.ops.abs(x)))

    Args:
        labels: numbers in [0, 1], of the shape of `logits`, any numeric dtype.
        logits: any shape, bfloat16, float16, float32 or float64, read in their own dtype.
        axis: None for one loss per label, or the axis over which the labels of an example lie: the result is then the
            mean over the labels that are present, and the losses of single labels are never in memory.
        mask: booleans of the shape of `logits`; a False entry is a missing label.
        ignore_class: the label that marks a missing one: a number, or nan.
        label_smoothing: share `s` in [0, 1] by which labels move to 1/2.
        pos_weight: weight `w` of positive labels: a number, or one per label (`[L]`, the size of `axis` or of the last
            axis).
        focal_gamma: exponent of the focal factor; 0 is plain cross-entropy.
        focal_alpha: weight of positive labels in [0, 1], negative ones weigh `1 - alpha`; None for no balancing.

    Returns:
        Losses in nats, float32 (float64 for float64 logits), of the shape of `logits` (without `axis`). Missing labels
        have loss 0 and gradient 0, and so has an example without any label.

    Raises:
        ValueError: shapes that do not fit.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> labels = np.array([[1.0, 0.0, np.nan]], "float32")
    >>> logits = np.array([[2.0, -1.0, 7.0]], "float32")
    >>> loss = kx.kernels.sigmoid_cross_entropy(labels, logits, ignore_class=float("nan"))
    >>> [round(float(x), 4) for x in loss[0]]
    [0.1269, 0.3133, 0.0]
    >>> mean = kx.kernels.sigmoid_cross_entropy(labels, logits, ignore_class=float("nan"), axis=-1)
    >>> round(float(mean[0]), 4)
    0.2201

    References: focal loss, arXiv:1708.02002; `pos_weight` as in PyTorch's `BCEWithLogitsLoss`.
    """
    labels, logits = _targets.to_tensor(labels), _targets.to_tensor(logits)
    if not _targets.is_float(logits):
        logits = ops.cast(logits, "float32")
    if not _targets.same_shape(labels.shape, logits.shape):
        raise ValueError(
            "`labels` and `logits` must have the same shape. "
            f"Received: labels of shape {tuple(labels.shape)} and logits of shape {tuple(logits.shape)}."
        )
    labels = _targets.asserted_to_fit(labels, logits, "`labels` and `logits` must have the same shape.")
    shape, rank = ops.shape(logits), len(logits.shape)
    learned = _targets.is_float(labels)
    if not learned:
        labels = ops.cast(labels, _targets.accumulator_dtype(logits))
    along = -1 if axis is None else _targets.checked_axis(axis, rank)
    rows, label_rows = (_targets.as_rows(t, along) if rank else ops.reshape(t, (1, 1)) for t in (logits, labels))
    tensors = [_positive_weights(pos_weight, rows)]
    if mask is not None:
        tensors.append(_targets.as_rows(ops.cast(_targets.to_tensor(mask), "bool"), along))
    options: dict[str, Any] = {
        "smoothing": float(label_smoothing),
        "gamma": float(focal_gamma),
        "alpha": None if focal_alpha is None else float(focal_alpha),
        "missing": None if ignore_class is None else float(ignore_class),
        "reduced": axis is not None,
    }
    # A Python nan is never equal to itself and would compile anew at every call.
    if options["missing"] is not None and math.isnan(options["missing"]):
        options["missing"] = "nan"
    loss = _sigmoid(rows, label_rows, *tensors, **options)
    if learned:
        loss = loss + _for_labels(label_rows, rows, *tensors, **options)
    if axis is not None:
        shape = tuple(size for i, size in enumerate(shape) if i != along)
    return ops.reshape(loss, shape)


def present(labels: Any, mask: Any, ignore_class: Any) -> Any:
    """True where a label is there: the mask allows it and it is not `ignore_class`. None where all are."""
    return _targets.counted(labels, mask, ignore_class)


def _positive_weights(pos_weight, rows):
    weights = ops.convert_to_tensor(1.0 if pos_weight is None else pos_weight, dtype=_targets.accumulator_dtype(rows))
    if len(weights.shape) > 1 or (len(weights.shape) == 1 and not _targets.same_shape(weights.shape, rows.shape[1:2])):
        raise ValueError(
            f"`pos_weight` must be one number, or one for each of the {rows.shape[1]} labels of an example. "
            f"Received: pos_weight of shape {tuple(weights.shape)}."
        )
    return ops.reshape(weights, (1, -1) + (1,) * (len(rows.shape) - 2))


def _log1p_exp(negative):
    """`log(1 + exp(negative))` for `negative <= 0`.

    XLA:CPU spends most of the kernel in its log1p. For float32 the series of `2 atanh(z)`, `z = t / (2 + t)`, is exact
    to rounding over the whole range (`t <= 1`, so `z <= 1/3`; the first term left out is below 3e-9) and runs at half
    the time.
    """
    t = ops.exp(negative)
    if _targets.dtype_of(t) == "float64":
        return ops.log1p(t)
    z = t / (2.0 + t)
    square = z * z
    series = 1.0 / 15.0
    for odd in (13.0, 11.0, 9.0, 7.0, 5.0, 3.0):
        series = series * square + 1.0 / odd
    return 2.0 * (z + z * square * series)


def _is_present(labels, mask, missing):
    there = None
    if missing == "nan":
        there = ops.logical_not(ops.isnan(labels))
    elif missing is not None:
        there = ops.not_equal(labels, ops.cast(missing, labels.dtype))
    if mask is None:
        return there
    return mask if there is None else ops.logical_and(mask, there)


class _Terms:
    """The parts of one label's loss, of which XLA computes those that are used."""

    def __init__(self, logits, labels, weight, mask, *, smoothing, gamma, alpha, missing):
        dtype = _targets.accumulator_dtype(logits)
        self.gamma, self.alpha, self.smoothing = gamma, alpha, smoothing
        self.there = _is_present(labels, mask, missing)
        x, y = ops.cast(logits, dtype), ops.cast(labels, dtype)
        x, y = selected(x, self.there), selected(y, self.there)
        self.y = y * (1.0 - smoothing) + 0.5 * smoothing if smoothing else y
        self.weight = weight
        # Branches rather than abs and maximum, whose derivatives at 0 are not those of the sum they are parts of.
        right = x >= 0
        size = ops.where(right, x, -x)
        common = _log1p_exp(-size)
        self.positive = ops.where(right, 0.0, -x) + common
        self.negative = ops.where(right, x, 0.0) + common
        small = ops.exp(-size)
        big = 1.0 / (1.0 + small)
        # sigma(x) and sigma(-x), each computed without 1 - the other.
        self.p = ops.where(right, big, small * big)
        self.q = ops.where(right, small * big, big)

    def plain(self):
        return times(self.weight * self.y, self.positive) + times(1.0 - self.y, self.negative)

    def plain_slope(self):
        return (1.0 - self.y) * self.p - self.weight * self.y * self.q

    def balanced(self, value):
        if self.alpha is None:
            return value
        return times(self.y * self.alpha + (1.0 - self.y) * (1.0 - self.alpha), value)

    def _focus(self):
        # u^gamma, and plain / u, which stays finite where both tend to 0. The power of 0 is not taken: its derivative
        # is infinite for gamma < 1.
        u = self.y * self.q + (1.0 - self.y) * self.p
        some = u > 0
        safe = ops.where(some, u, ops.ones((), u.dtype))
        ratio = selected(self.plain() / safe, some)
        return ops.where(some, safe**self.gamma, u), ratio

    def loss(self):
        loss = self.plain()
        if self.gamma:
            loss = self._focus()[0] * loss
        return selected(self.balanced(loss), self.there)

    def for_logits(self):
        slope = self.plain_slope()
        if self.gamma:
            focus, ratio = self._focus()
            turn = (1.0 - 2.0 * self.y) * self.p * self.q
            slope = focus * (slope + self.gamma * times(turn, ratio))
        return selected(self.balanced(slope), self.there)

    def for_labels(self):
        plain, slope = self.plain(), self.weight * self.positive - self.negative
        focus = 1.0
        if self.gamma:
            focus, ratio = self._focus()
            slope = focus * (slope + self.gamma * times(self.q - self.p, ratio))
        slope = self.balanced(slope)
        if self.alpha is not None:
            slope = slope + times(2.0 * self.alpha - 1.0, focus * plain)
        return selected((1.0 - self.smoothing) * slope, self.there)


@compiled_by_rows(outputs=2, blocked=lambda *, reduced, **others: reduced)
def _sigmoid_forward(logits, labels, weight, mask=None, *, reduced, missing, **options):
    loss = _Terms(logits, labels, weight, mask, missing=missing, **options).loss()
    if not reduced:
        return loss, ()
    there = _is_present(labels, mask, missing)
    there = ops.ones_like(loss) if there is None else ops.cast(there, loss.dtype)
    count = ops.maximum(ops.sum(there, axis=1, keepdims=True), 1.0)
    return ops.sum(loss, axis=1, keepdims=True) / count, (count,)


def _gradient(upstream, saved, logits, labels, weight, mask, slope, like, *, reduced, missing, **options):
    # NaN and infinities that nobody asked for are taken out. Others are not: they are the derivative for upstream.
    finite = ops.logical_and(ops.isfinite(logits), ops.isfinite(labels))
    used = ops.logical_or(ops.not_equal(upstream, 0.0), finite)
    logits, labels = selected(logits, used), selected(labels, used)
    terms = _Terms(logits, labels, weight, mask, missing=missing, **options)
    if reduced:
        (count,) = saved
        upstream = upstream / count
    return ops.cast(upstream * slope(terms), like.dtype)


@compiled
def _sigmoid_backward(upstream, saved, logits, labels, weight, mask=None, **options):
    return _gradient(upstream, saved, logits, labels, weight, mask, _Terms.for_logits, logits, **options)


_sigmoid = differentiable(_sigmoid_forward, _sigmoid_backward)


# The gradient for the labels is a kernel of its own, of value 0, so that only who asks for it pays for it.


def _no_loss(labels, logits, *others, reduced, **options):
    zeros = ops.zeros_like(labels[:, :1] if reduced else labels)
    return ops.cast(zeros, _targets.accumulator_dtype(logits)), ()


@compiled
def _backward_for_labels(upstream, saved, labels, logits, weight, mask=None, **options):
    if options["reduced"]:
        saved = _sigmoid_forward.in_one_piece(logits, labels, weight, *([] if mask is None else [mask]), **options)[1]
    return _gradient(upstream, saved, logits, labels, weight, mask, _Terms.for_labels, labels, **options)


_for_labels = differentiable(_no_loss, _backward_for_labels)
