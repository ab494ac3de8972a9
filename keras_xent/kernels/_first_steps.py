"""Plain softmax losses of few numbers in a step that is compiled as one program, written for what XLA compiles fastest.

A small array takes less time to run than its program takes to compile: each loop of it takes 15 ms (TensorFlow 2.21),
and so does a division of rows, of which XLA makes a loop of its own. So, unlike in `_fast_steps.py`, there is no branch
for infinite logits, nothing is written to single places of an array, and what is divided are the gradients.

Formulas and residuals are those of `_softmax_row.py`, for logits `[n, C]` without options. What `keep` computes is one
more residual.
"""

from keras import ops

from keras_xent._backend import rows_of, take_at_columns
from keras_xent.kernels import _softmax_row as row
from keras_xent.kernels._dtypes import upcast
from keras_xent.kernels._fast_steps import FEW_NUMBERS, Step
from keras_xent.kernels._logarithms import log1p
from keras_xent.kernels._masking import multiply_no_nan, nan_unless
from keras_xent.kernels._options import SoftmaxOptions
from keras_xent.kernels._xla_cpu import has_few_classes


def _fits(logits, labels, *class_weight, options):
    if class_weight or options != SoftmaxOptions() or len(logits.shape) != 2:
        return False
    # Many short rows: what is done for each row takes longer than what is done for each number.
    return not has_few_classes(logits) or (rows_of(logits) or 0) * logits.shape[1] < FEW_NUMBERS


def _sum(array):
    return ops.sum(array, axis=1, keepdims=True)


def _max(logits):
    return ops.stop_gradient(ops.max(upcast(logits), axis=1, keepdims=True))


# Sparse.


def _exp_minus_label(logits, labels, max_logit):
    """`exp(x - max_logit)`, for the label less 1: the sum of a row is `sum_exp_minus_one`."""
    exp_shifted = row.exp_shifted(logits, max_logit, None)
    return ops.where(ops.equal(row.class_ids(logits), labels), exp_shifted - 1.0, exp_shifted)


def _sparse_forward(logits, labels, *, options):
    max_logit = _max(logits)
    exp_minus_label = _exp_minus_label(logits, labels, max_logit)
    sum_exp_minus_one = _sum(exp_minus_label)
    sum_exp_minus_one = row.with_infinite_logits(sum_exp_minus_one, max_logit, None)
    sum_exp_minus_one = nan_unless(labels >= 0, sum_exp_minus_one)
    label_logit = take_at_columns(logits, ops.maximum(labels, 0))
    loss = row.nll(label_logit, max_logit, sum_exp_minus_one, None)
    return loss, (max_logit, sum_exp_minus_one, exp_minus_label)


def _sparse_keep(residuals, logits, labels, *, options):
    return _exp_minus_label(logits, labels, residuals[0])


def _sparse_backward(upstream, residuals, logits, labels, *, options):
    dead = row.is_dead_row(upstream, *residuals[:2])
    sum_exp_minus_one, exp_minus_label = row.zero_rows(dead, *residuals[1:])
    # p - 1 of the label is less the sum of the others, which is exact where p has rounded to 1.
    is_label = ops.equal(row.class_ids(logits), labels)
    gradient = ops.where(is_label, exp_minus_label - sum_exp_minus_one, exp_minus_label)
    return ops.cast(upstream * gradient / (1.0 + sum_exp_minus_one), logits.dtype)


SPARSE = Step(_sparse_forward, _sparse_backward, _sparse_keep, _fits)


# Dense.


def _dense_forward(logits, targets, *, options):
    max_logit = _max(logits)
    targets = ops.cast(targets, max_logit.dtype)
    exp_shifted = row.exp_shifted(logits, max_logit, None)
    sum_exp, sum_targets = _sum(exp_shifted), _sum(targets)
    sum_exp_minus_one = row.subtract_one(sum_exp, _sum(ops.where(exp_shifted >= 1.0, exp_shifted - 1.0, exp_shifted)))
    sum_exp_minus_one = row.with_infinite_logits(sum_exp_minus_one, max_logit, None)
    below_max = row.max_minus_logit(upcast(logits), max_logit, None)
    loss = _sum(multiply_no_nan(targets, below_max)) + multiply_no_nan(sum_targets, log1p(sum_exp_minus_one))
    return loss, (max_logit, sum_exp_minus_one, sum_targets, exp_shifted)


def _dense_keep(residuals, logits, targets, *, options):
    return row.exp_shifted(logits, residuals[0], None)


def _dense_backward(upstream, residuals, logits, targets, *, options):
    *of_row, exp_shifted = residuals
    dead = row.is_dead_row(upstream, *of_row)
    sum_exp_minus_one, sum_targets, exp_shifted, targets = row.zero_rows(
        dead, *of_row[1:], exp_shifted, ops.cast(targets, exp_shifted.dtype)
    )
    # See `_softmax_row.logits_gradient`.
    is_likely = ops.logical_and(exp_shifted >= 1.0, sum_exp_minus_one < 1.0)
    p_times_sum = ops.where(is_likely, (exp_shifted - 1.0) - sum_exp_minus_one, exp_shifted)
    rest = ops.where(is_likely, sum_targets - targets, -targets)
    gradient = upstream * (p_times_sum * sum_targets / (1.0 + sum_exp_minus_one) + rest)
    return ops.cast(gradient, logits.dtype)


DENSE = Step(_dense_forward, _dense_backward, _dense_keep, _fits)
