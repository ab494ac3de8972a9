"""Sigmoid cross-entropy of binary and of many independent labels.

With logit `x`, label `y` in [0, 1] and `L = log(1 + exp(-|x|))`, the two costs are `softplus(-x) = max(-x, 0) + L` for
a positive and `softplus(x) = max(x, 0) + L` for a negative label: nothing overflows and nothing cancels.
"""

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from keras_xent._backend import custom_gradient, no_autograph, on_any_mesh, with_rounded_rows
from keras_xent._named_arguments import named_arguments
from keras_xent._types import Tensor
from keras_xent.kernels._compiled import CompiledKernel, row_kernel
from keras_xent.kernels._dtypes import (
    accumulator_dtype,
    dtype_of,
    is_finite,
    is_float,
    to_float_tensor,
    to_tensor,
    upcast,
)
from keras_xent.kernels._labels import is_soft_label, weights_tensor
from keras_xent.kernels._masking import both, nan_unless, where_or_zero
from keras_xent.kernels._options import SigmoidOptions
from keras_xent.kernels._shapes import as_rows, checked_axis, ensure_shape, ensure_size, reshape_to, same_shape, size_of
from keras_xent.kernels._sigmoid_terms import Terms, valid_labels
from keras_xent.kernels._xla_cpu import COMPILES_SLOWLY, has_few_classes, is_small, row_sum, sums_in_slices


@no_autograph
@named_arguments
@on_any_mesh
def sigmoid_cross_entropy(
    labels: Tensor,
    logits: Tensor,
    *,
    axis: int | None = None,
    mask: Tensor = None,
    ignore_class: float | None = None,
    label_smoothing: float = 0.0,
    pos_weight: Any = None,
    focal_gamma: float = 0.0,
    focal_alpha: float | None = None,
) -> Tensor:
    """Cross-entropy of independent binary labels under the sigmoid of the logits.

    For one yes-or-no answer, and for many at once (multi-label), some of which may be missing. Labels get a gradient
    too, where one is requested.

    Formula, for smoothing `s`, `y' = y (1 - s) + s / 2`, positive weight `w`:
    `w y' softplus(-x) + (1 - y') softplus(x)`; if focal, times `u^gamma` with `u = y' (1 - p) + (1 - y') p`, and times
    `alpha y' + (1 - alpha) (1 - y')`.

    Equivalent to (without options):

        loss = keras.ops.maximum(x, 0) - x * y + keras.ops.log1p(keras.ops.exp(-keras.ops.abs(x)))

    Args:
        labels: numbers in [0, 1], of the shape of `logits`, any numeric dtype. Below -0.21 or above 1.21, past what
            soft and noisy labels are, they give NaN in the loss and in the gradient of their row.
        logits: any shape, bfloat16, float16, float32 or float64, read in their own dtype.
        axis: None for one loss per label, or the axis over which the labels of an example lie: the result is then the
            mean over the labels that are present, and the losses of single labels are never materialized.
        mask: booleans of the shape of `logits`; a False entry is a missing label.
        ignore_class: the label that marks a missing one: a number, or nan.
        label_smoothing: share `s` in [0, 1] by which labels move to 1/2.
        pos_weight: weight `w` of positive labels: a number, or one per label (`[L]`, the size of `axis` or of the last
            axis). Without a gradient.
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
    labels = to_tensor(labels, "labels")
    logits = to_float_tensor(logits, "logits")
    labels = _of_shape(labels, logits, "labels")
    rank = len(logits.shape)
    differentiable_labels = is_float(labels)
    if not differentiable_labels:
        labels = ops.cast(labels, accumulator_dtype(logits))
    label_axis = -1 if axis is None else checked_axis(axis, rank)
    given = [logits, labels]
    if mask is not None:
        given.append(_of_shape(ops.cast(to_tensor(mask, "mask"), "bool"), logits, "mask"))
    rows, label_rows, *masks = (as_rows(t, label_axis) if rank else ops.reshape(t, (1, 1)) for t in given)
    options = SigmoidOptions(label_smoothing, focal_gamma, focal_alpha, ignore_class, axis is not None)
    weight = _positive_weights(pos_weight, rows)
    loss = _losses(rows, label_rows, weight, *masks, options=options, differentiable_labels=differentiable_labels)
    return reshape_to(loss, logits, without=None if axis is None else label_axis)


def _of_shape(tensor, logits, name):
    sentence = f"`{name}` and `logits` must have the same shape."
    if not same_shape(tensor.shape, logits.shape):
        raise ValueError(
            f"{sentence} Received: {name} of shape {tuple(tensor.shape)} and logits of shape {tuple(logits.shape)}."
        )
    return ensure_shape(tensor, logits, sentence)


def _positive_weights(pos_weight, rows):
    weights = weights_tensor("pos_weight", 1.0 if pos_weight is None else pos_weight, accumulator_dtype(rows))
    if len(weights.shape) > 1 or (len(weights.shape) == 1 and not same_shape(weights.shape, rows.shape[1:2])):
        raise ValueError(
            f"`pos_weight` must be one number, or one for each of the {rows.shape[1]} labels of an example. "
            f"Received: pos_weight of shape {tuple(weights.shape)}."
        )
    if len(weights.shape):
        weights = ensure_size(weights, size_of(rows, 1), "`pos_weight` must be one number, or one for each label.")
    return ops.reshape(weights, (1, -1) + (1,) * (len(rows.shape) - 2))


def _is_blocked(rows, options):
    if is_small(rows) and (has_few_classes(rows) or COMPILES_SLOWLY):
        # The terms of short rows are faster in memory (TensorFlow 2.21, [4096, 1000]: 7.4 -> 4.5 ms). Of longer rows a
        # program of slices takes longer to compile.
        return options.mean_over_labels and sums_in_slices(rows)
    return options.mean_over_labels and not sums_in_slices(rows)


# Slices are faster than blocks (TensorFlow 2.21, [2048, 32000], forward pass: 116 -> 52 ms).
@row_kernel(num_outputs=2, is_blocked=_is_blocked)
def _sigmoid_forward(logits, labels, weight, mask=None, *, options):
    if not options.mean_over_labels:
        return Terms(logits, labels, weight, mask, options).loss(), ()
    dtype = accumulator_dtype(logits)
    masks = () if mask is None else (mask,)
    ignore_class = options.ignore_class
    if isinstance(ignore_class, (int, float)):
        # Slices of 16-bit labels are float32, in which 0.1 differs from that of 16 bits.
        ignore_class = float(np.asarray(ignore_class).astype(dtype_of(labels)))
        options = dataclasses.replace(options, ignore_class=ignore_class)

    def loss(logits, labels, weight, mask=None):
        return Terms(logits, labels, weight, mask, options).loss()

    def is_valid(labels, mask=None):
        return ops.cast(valid_labels(labels, mask, ignore_class), dtype)

    def is_out_of_range(labels, mask=None):
        valid = valid_labels(labels, mask, ignore_class)
        return ops.cast(both(ops.logical_not(is_soft_label(ops.cast(labels, dtype))), valid), dtype)

    if mask is None and ignore_class is None:
        count = ops.cast(ops.shape(logits)[1], dtype)
    else:
        count = ops.maximum(row_sum(is_valid, labels, *masks), 1.0)
    # One label out of range makes the gradient of its whole row NaN. Counted in floats: XLA:CPU looks for a True among
    # the booleans of a row in one thread, one by one.
    count = nan_unless(ops.equal(row_sum(is_out_of_range, labels, *masks), 0.0), count)
    return row_sum(loss, logits, labels, weight, *masks) / count, (count,)


def _gradient(upstream, residuals, logits, labels, weight, mask, slope, dtype, options):
    # NaN and infinities are removed where the upstream gradient is 0. Elsewhere they are the derivative.
    finite = ops.logical_and(is_finite(upcast(logits)), is_soft_label(ops.cast(labels, accumulator_dtype(logits))))
    is_used = ops.logical_or(ops.not_equal(upstream, 0.0), finite)
    logits, labels = where_or_zero(logits, is_used), where_or_zero(labels, is_used)
    terms = Terms(logits, labels, weight, mask, options)
    if options.mean_over_labels:
        (count,) = residuals
        upstream = where_or_zero(upstream / count, ops.not_equal(upstream, 0.0))
    value = slope(terms)
    gradient = upstream * value
    if slope is Terms.labels_gradient:
        # The difference of two costs, which is as large as a logit may be, and infinite where that overflows.
        gradient = where_or_zero(gradient, ops.logical_or(ops.not_equal(upstream, 0.0), is_finite(value)))
    return ops.cast(gradient, dtype)


@CompiledKernel
def _sigmoid_backward(upstream, residuals, logits, labels, weight, mask=None, *, options):
    slope = Terms.logits_gradient
    return _gradient(upstream, residuals, logits, labels, weight, mask, slope, logits.dtype, options)


_sigmoid = custom_gradient(_sigmoid_forward, _sigmoid_backward, has_rows=(True, True, False, True))


# The gradient for the labels is a kernel of its own, of value 0, which costs nothing where no such gradient is
# requested.


def _zero_forward(labels, logits, *others, options):
    zeros = ops.zeros_like(labels[:, :1] if options.mean_over_labels else labels)
    return ops.cast(zeros, accumulator_dtype(logits)), ()


@CompiledKernel
def _sigmoid_backward_for_labels(upstream, residuals, labels, logits, weight, mask=None, *, options):
    if options.mean_over_labels:
        tensors = [weight] if mask is None else [weight, mask]
        residuals = _sigmoid_forward.unblocked(logits, labels, *tensors, options=options)[1]
    slope = Terms.labels_gradient
    return _gradient(upstream, residuals, logits, labels, weight, mask, slope, labels.dtype, options)


_sigmoid_for_labels = custom_gradient(
    _zero_forward, _sigmoid_backward_for_labels, has_rows=(True, True, False, True), is_often_needed=False
)


def _losses_of_rows(rows, labels, *tensors, options, differentiable_labels):
    loss = _sigmoid(rows, labels, *tensors, options=options)
    return loss + _sigmoid_for_labels(labels, rows, *tensors, options=options) if differentiable_labels else loss


# Rounded here too, which adds rows once for the two.
_losses = with_rounded_rows(_losses_of_rows, (True, True, False, True))
