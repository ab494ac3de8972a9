"""Plain softmax losses in a step that is compiled as one program on a CPU, written for what XLA runs fastest.

That is a step of JAX (0.10), or one of TensorFlow under XLA (2.21) for rows that are too long for `row_sum` to be a
product. It keeps the exponentials in memory. What is fast:

- Sums of an array in memory, of the product of two, of a difference or a floor, and for few classes a product with a
  vector of ones. A comparison inside a sum makes it four times as slow, so that the label's term is taken out of an
  array before it is summed, by writing one number to each row.
- Numbers of a row as vectors `[n]`: loops over columns `[n, 1]` are not vectorized.
- A branch for what most batches do not have: infinite logits.

Formulas and residuals are those of `_softmax_row.py` and `_label_row.py`, for logits `[n, C]`.
"""

from collections.abc import Callable
from typing import NamedTuple

from keras import ops

from keras_xent._backend import rows_of, set_at_columns, take_at_columns
from keras_xent.kernels import _label_row as label_row
from keras_xent.kernels import _softmax_row as row
from keras_xent.kernels._dtypes import accumulator_dtype, dtype_of, is_finite, largest, narrow_float, upcast
from keras_xent.kernels._labels import gather_class_weights
from keras_xent.kernels._logarithms import log1p
from keras_xent.kernels._masking import multiply_no_nan, nan_unless, where_or_zero
from keras_xent.kernels._options import SoftmaxOptions
from keras_xent.kernels._xla_cpu import cast_to_nearest_even, has_few_classes, row_sum

# A branch takes some microseconds, as do the loops of so small an array.
FEW_NUMBERS = 2**13


def _fits(logits):
    """Whether a step of this file is faster for these logits."""
    if dtype_of(logits) == "float64" or len(logits.shape) != 2:
        return False
    num_rows, classes = rows_of(logits), logits.shape[1]
    is_known = isinstance(num_rows, int) and isinstance(classes, int)
    # An unknown number of rows is rounded up to one of many.
    return num_rows * classes >= FEW_NUMBERS if is_known else num_rows is None and has_few_classes(logits)


class Step(NamedTuple):
    """The parts of a step, as `custom_gradient` takes them, and for which inputs it is."""

    forward: Callable
    backward: Callable
    keep: Callable
    fits: Callable[..., bool]


# Not `x[:, None]` and `x[:, 0]`, which TensorFlow traces as five operations each.


def _column(vector):
    return ops.expand_dims(vector, 1)


def _vector(column):
    return ops.squeeze(column, axis=1)


def _sum(array):
    if has_few_classes(array):
        return ops.matmul(array, ops.ones((array.shape[1],), array.dtype))
    return ops.sum(array, axis=1)


def _max(logits):
    return _vector(row.max_of_logits(logits))


def _clean_columns(dead, *columns):
    return row.zero_rows(dead, *(_vector(column) for column in columns))


# Sparse.


def _exp_off_label(logits, label, max_logit):
    """`exp(x - max_logit)`, 0 for the label: `[n, C]`."""
    exp_shifted = row.exp_shifted(logits, _column(max_logit), None)
    if has_few_classes(logits):
        is_other = ops.not_equal(row.class_ids(logits), _column(label))
        return where_or_zero(exp_shifted, is_other)
    return set_at_columns(exp_shifted, _column(label), _column(ops.zeros_like(max_logit)))


def _label(labels):
    return ops.maximum(_vector(labels), 0)


def _sparse_forward(logits, labels, class_weight=None, *, options):
    max_logit = _max(logits)
    label = _label(labels)
    label_logit = upcast(_vector(take_at_columns(logits, _column(label))))
    at_label = row.exp_shifted(label_logit, max_logit, None) - 1.0
    sum_exp_minus_one = _sum(_exp_off_label(logits, label, max_logit)) + at_label
    sum_exp_minus_one = row.with_infinite_logits(sum_exp_minus_one, max_logit, None)
    sum_exp_minus_one = nan_unless(_vector(labels) >= 0, sum_exp_minus_one)
    sum_of_losses = None
    if options.label_smoothing:
        num_classes = row.num_classes_of(logits)
        mean_below_max = _vector(row_sum(lambda x: (_column(max_logit) - upcast(x)) * (1.0 / num_classes), logits))
        mean_of_losses = label_row.mean_of_losses(mean_below_max, num_classes, max_logit, sum_exp_minus_one)
        sum_of_losses = options.label_smoothing * mean_of_losses
    weight = gather_class_weights(class_weight, label)
    loss = label_row.loss(label_logit, weight, sum_of_losses, max_logit, sum_exp_minus_one, options)
    if class_weight is not None:
        loss = nan_unless(_vector(labels) >= 0, loss)
    return _column(loss), (_column(max_logit), _column(sum_exp_minus_one))


def _sparse_keep(residuals, logits, labels, class_weight=None, *, options):
    return _exp_off_label(logits, _label(labels), _vector(residuals[0]))


def _sparse_backward(upstream, residuals, logits, labels, class_weight=None, *, options):
    *columns, exp_off_label = residuals
    upstream = _vector(upstream)
    dead = row.is_dead_row(upstream, *(_vector(column) for column in columns))
    max_logit, sum_exp_minus_one = _clean_columns(dead, *columns)
    label, num_classes = _label(labels), row.num_classes_of(logits)
    (label_logit,) = row.zero_rows(dead, _vector(take_at_columns(logits, _column(label))))
    weight = gather_class_weights(class_weight, label)
    at_label, factor = label_row.gradient(label_logit, weight, 1.0, num_classes, max_logit, sum_exp_minus_one, options)
    (exp_off_label,) = row.zero_rows(_column(dead), exp_off_label)
    scale = upstream / (1.0 + sum_exp_minus_one)
    at_label, gradient = at_label * scale, exp_off_label * _column(factor * scale)
    if options.label_smoothing:
        gradient = gradient - _column(upstream * (options.label_smoothing / num_classes))
    if has_few_classes(logits) or narrow_float(logits):
        gradient = ops.where(ops.equal(row.class_ids(logits), _column(label)), _column(at_label), gradient)
        return cast_to_nearest_even(gradient, logits.dtype)
    return set_at_columns(gradient, _column(label), _column(at_label))


def _fits_sparse(logits, labels, *class_weight, options):
    is_smoothed = options.label_smoothing > 0
    if options.logit_softcap is not None or (is_smoothed and (class_weight or options.focal_gamma)):
        return False
    return _fits(logits)


SPARSE = Step(_sparse_forward, _sparse_backward, _sparse_keep, _fits_sparse)


# Dense.


def _fits_dense(logits, targets, *class_weight, options):
    return not class_weight and options == SoftmaxOptions() and rows_of(logits) is not None and _fits(logits)


def _dense_forward(logits, targets, *, options):
    max_logit = _max(logits)
    targets = ops.cast(targets, accumulator_dtype(logits))
    # The maximum is used here only, and so is subtracted by the loop that finds it.
    shifted = upcast(logits) - _column(max_logit)
    exp_shifted = ops.exp(shifted)
    sum_exp, distance = _sum(exp_shifted), -ops.sum(targets * shifted, axis=1)
    sum_exp_minus_one = row.subtract_one(sum_exp, _sum(exp_shifted - ops.floor(exp_shifted)))

    def with_infinities():
        max_logit = _max(logits)
        x = row.shifted_logits(upcast(logits), _column(max_logit), None)
        infinite = row.with_infinite_logits(_sum(ops.exp(x)) - 1.0, max_logit, None)
        far = _sum(multiply_no_nan(targets, -x))
        # Of classes infinitely far below a logit of +inf.
        is_below = ops.logical_and(row.is_positive_infinity(max_logit), ops.not_equal(far, 0.0))
        far = ops.where(is_below, far * largest(far) * largest(far), far)
        is_sum_finite = is_finite(sum_exp)
        return (
            ops.where(is_sum_finite, sum_exp_minus_one, infinite),
            ops.where(ops.logical_and(is_sum_finite, is_finite(distance)), distance, far),
        )

    all_finite = is_finite(ops.sum(sum_exp + distance))
    sum_exp_minus_one, distance = ops.cond(all_finite, lambda: (sum_exp_minus_one, distance), with_infinities)
    sum_targets = _sum(targets)
    loss = multiply_no_nan(sum_targets, log1p(sum_exp_minus_one)) + distance
    return _column(loss), (_column(max_logit), _column(sum_exp_minus_one), _column(sum_targets))


def _dense_keep(residuals, logits, targets, *, options):
    return ops.exp(upcast(logits) - residuals[0])


def _dense_backward(upstream, residuals, logits, targets, *, options):
    _, *columns, exp_shifted = residuals
    upstream = _vector(upstream)
    dead = row.is_dead_row(upstream, *(_vector(column) for column in columns))
    sum_exp_minus_one, sum_targets = _clean_columns(dead, *columns)
    exp_shifted, targets = row.zero_rows(_column(dead), exp_shifted, ops.cast(targets, exp_shifted.dtype))
    # 1 for +inf, and for NaN, whose row has a NaN beside.
    exp_shifted = ops.where(exp_shifted <= 1.0, exp_shifted, ops.ones((), exp_shifted.dtype))
    # See `_softmax_row.logits_gradient`.
    ratio = sum_targets / (1.0 + sum_exp_minus_one)
    at_max = (_column(sum_targets) - targets) + ((exp_shifted - 1.0) - _column(sum_exp_minus_one)) * _column(ratio)
    off_max = exp_shifted * _column(ratio) - targets
    max_above_half = ops.where(sum_exp_minus_one < 1.0, 1.0, float("inf"))
    gradient = _column(upstream) * ops.where(exp_shifted >= _column(max_above_half), at_max, off_max)
    return cast_to_nearest_even(gradient, logits.dtype)


DENSE = Step(_dense_forward, _dense_backward, _dense_keep, _fits_dense)
