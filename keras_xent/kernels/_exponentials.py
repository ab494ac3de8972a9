"""On a CPU, the softmax gradient of a chunk of logits as their exponentials, and one factor for each row.

The gradient of the cross-entropy, `u (p_c - [c = k])`, is `u / sum_exp` times a matrix: `exp(x_c - max_logit)`, and
minus the sum of these at the label. The factors go to the smaller matrices that the gradient is multiplied by. The
matrix takes the memory of the logits in one pass over all rows, on all threads, and that pass has the terms of the sum
too: XLA:CPU is slower with blocks of rows, whose gradient it writes to its place on one thread.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_xent._backend import add_at_columns, fori_loop, opaque, set_at_columns, take_at_columns
from keras_xent._types import Tensor
from keras_xent.kernels import _row_statistics as row_statistics
from keras_xent.kernels import _softmax_row as row
from keras_xent.kernels._dtypes import largest, upcast
from keras_xent.kernels._logarithms import finite_log, log1p
from keras_xent.kernels._masking import nan_unless, where_or_zero
from keras_xent.kernels._xla_cpu import row_sum


class LogitGradient(NamedTuple):
    """The gradient for logits `[n, V]`: `factors` `[n, 1]`, if any, times the matrix with its labels' numbers added."""

    matrix: Tensor
    factors: Tensor = None
    # `[n, 1]`. Not in the product with the kernel, which would round its terms of the other classes to a digit of the
    # label's: so the gradient of the hidden states is 10 times as exact.
    labels: Tensor = None
    at_label: Tensor = None

    def whole(self, read_before: Tensor = None) -> Tensor:
        """The matrix with the labels' numbers, in its memory once `read_before` `[n, ...]` is there."""
        if self.labels is None:
            return self.matrix
        at_label = self.at_label
        if read_before is not None:
            at_label = add_dependency(at_label, read_before[:, :1])
        return add_at_columns(self.matrix, self.labels, at_label)

    def scaled(self, array: Tensor) -> Tensor:
        """The array `[n, ...]` times the factors."""
        return array if self.factors is None else array * self.factors


class LabelExponentials(NamedTuple):
    """Exponentials of a chunk, 0 for the label, and what the loss of its rows is made of."""

    exp_shifted: Tensor
    label_exp: Tensor
    sum_of_others: Tensor
    sum_exp_minus_one: Tensor
    nll: Tensor
    statistics: tuple[Tensor, ...]

    def gradient(self, labels: Tensor, upstream: Tensor) -> LogitGradient | None:
        """That of `sum(upstream * nll)`: factors are 0 for a row without an upstream gradient."""
        if upstream is None:
            return None
        factors = where_or_zero(upstream / (1.0 + self.sum_exp_minus_one), ops.not_equal(upstream, 0.0))
        # Of the label's gradient, 1 - p is the share of the others, which is exact where p rounds to 1.
        return LogitGradient(self.exp_shifted, factors, ops.maximum(labels, 0), -self.sum_of_others)

    def gradient_of_statistics(self, labels: Tensor, upstream: Tensor) -> LogitGradient:
        """The same for columns of `upstream`: log-probability `u`, entropy `v` and log-sum-exp `w`.

        With the entropy `H` the gradient is `p (w - u - v (log p + H))`, and `u (1 - p) + p (w - v (log p + H))` at the
        label.
        """
        (entropy,) = self.statistics
        is_used = ops.any(ops.not_equal(upstream, 0.0), axis=1, keepdims=True)
        sum_exp = where_or_zero(1.0 + self.sum_exp_minus_one, is_used)
        mean_below = where_or_zero(entropy - log1p(self.sum_exp_minus_one), is_used)
        u, v, w = upstream[:, 0:1], upstream[:, 1:2], upstream[:, 2:3]
        # log p + H has the mean 0: what a mean of many terms has rounded is in the rest of the sum of its parts.
        rest = row_sum(lambda e, mean: e * (_below_max(e) - mean), self.exp_shifted, mean_below)
        label_below = _below_max(self.label_exp)
        rest = rest + self.label_exp * (label_below - mean_below)
        center = mean_below + where_or_zero(rest / sum_exp, is_used)
        matrix = self.exp_shifted * (v * (_below_max(self.exp_shifted) - center) + (w - u))
        at_label = u * self.sum_of_others + self.label_exp * (v * (label_below - center) + w)
        return LogitGradient(matrix, where_or_zero(1.0 / sum_exp, is_used), ops.maximum(labels, 0), at_label)


def of_labels(
    logits: Tensor, labels: Tensor, *, scale: float = 1.0, statistics: tuple[str, ...] = ()
) -> LabelExponentials:
    """The exponentials of logits times `scale`, with labels `[n, 1]`, -1 for one out of range.

    `statistics` are names among those of `_row_statistics.py`.
    """
    # What compares logits comes before their memory is taken.
    compared = {"rank": row.rank_of_label(logits, labels)} if "rank" in statistics else {}
    others, label_logit = _label_apart(logits, labels, read_before=tuple(compared.values()))
    max_of_others = ops.max(others, axis=1, keepdims=True)
    max_logit = ops.maximum(max_of_others, label_logit)
    if "hit" in statistics:
        compared["hit"] = _is_first_of_largest(others, labels, label_logit, max_of_others)
    label_exp = _exp_shifted(label_logit, max_logit, scale)
    exp_shifted = in_place(others, max_logit, scale=scale, read_before=tuple(compared.values()))
    # Of what is in memory, XLA:CPU has a fast sum.
    sum_of_others = ops.sum(exp_shifted, axis=1, keepdims=True)
    if "hit" in statistics:
        compared["hit"] = _nan_without_label(compared["hit"], labels, sum_of_others, max_logit)
    sum_exp_minus_one = row.with_infinite_logits(sum_of_others + (label_exp - 1.0), max_logit, None)
    sum_exp_minus_one = nan_unless(labels >= 0, sum_exp_minus_one)
    columns = {
        **compared,
        "logsumexp": row.log_sum_exp(scale * max_logit, sum_exp_minus_one, None),
        "confidence": 1.0 / (1.0 + sum_exp_minus_one),
    }
    if "entropy" in statistics:
        columns["entropy"] = _entropy(exp_shifted, label_exp, sum_exp_minus_one)
        # The gradient is written over what the entropy reads.
        sum_of_others = add_dependency(sum_of_others, columns["entropy"])
    # Of large logits the difference is exact, and their multiples are rounded.
    nll = scale * row.max_minus_logit(label_logit, max_logit, None) + log1p(sum_exp_minus_one)
    found = tuple(columns[name] for name in statistics)
    return LabelExponentials(exp_shifted, label_exp, sum_of_others, sum_exp_minus_one, nll, found)


def _label_apart(logits, labels, *, read_before):
    """The logits with -inf for the label, in their memory once `read_before` are there, and the label's logits."""
    # By index: to compare each class with the label takes longer than the exponentials.
    label = ops.maximum(labels, 0)
    label_logit = upcast(take_at_columns(logits, label))
    least = add_dependency(ops.full_like(label_logit, -float("inf")), label_logit, *read_before)
    return set_at_columns(logits, label, least), label_logit


def _entropy(exp_shifted, label_exp, sum_exp_minus_one):
    def sum_of(term, *columns):
        def on(exp, *columns):
            return term(exp, _below_max(exp), *columns)

        return row_sum(on, exp_shifted, *columns, is_long_term=True) + on(label_exp, *columns)

    return row_statistics.entropy(sum_of, sum_exp_minus_one)


def _below_max(exp_shifted):
    """`max_logit - x`: 0 for the likeliest class, and of others off by what the exponential was rounded by.

    For an exponential of 0, with which it is multiplied, a number.
    """
    return -finite_log(exp_shifted)


def in_place(logits: Tensor, max_logit: Tensor, *, scale: float = 1.0, read_before: tuple[Tensor, ...] = ()) -> Tensor:
    """`exp(scale (x - max_logit))`, in the memory of the logits once `read_before` are there."""
    max_logit = add_dependency(max_logit, *read_before)
    # XLA:CPU gives a result that is updated in place later, as here at the label, memory of its own. The state of a
    # loop stays where it is; of how many iterations, XLA must not know, or there would be no loop.
    return fori_loop(opaque(1), lambda _, array: _exp_shifted(array, max_logit, scale), logits)


def zero_unused(gradient: LogitGradient, columns: tuple[Tensor, ...]) -> LogitGradient:
    """The gradient, in its memory: 0 in rows of NaN whose factor is 0, times which they would be NaN."""
    is_dead = row.is_dead_row(gradient.factors, *columns)
    # Almost always without an iteration: a selection would read and write the matrix once more.
    iterations = ops.cast(ops.any(is_dead), "int32")
    is_used = ops.logical_not(is_dead)
    matrix = fori_loop(iterations, lambda _, array: where_or_zero(array, is_used), gradient.matrix)
    at_label = None if gradient.labels is None else where_or_zero(gradient.at_label, is_used)
    return gradient._replace(matrix=matrix, at_label=at_label)


def _exp_shifted(logits, max_logit, scale):
    # The difference first, as in the nll.
    shifted = row.shifted_logits(upcast(logits), max_logit, None)
    return ops.exp(shifted if scale == 1.0 else scale * shifted)


def _is_first_of_largest(others, labels, label_logit, max_of_others):
    """1 where the label, which the others lack, has the largest logit, and no class before it the same; 0 elsewhere."""
    is_equal = ops.equal(label_logit, max_of_others)

    def is_before(logits, ids):
        return ops.cast(ops.logical_and(ops.equal(logits, label_logit), ids < labels), label_logit.dtype)

    # Few batches have equal logits.
    num_before = ops.cond(
        ops.any(is_equal),
        lambda: row_sum(is_before, others, row.class_ids(others)),
        lambda: ops.zeros_like(label_logit),
    )
    is_first = ops.logical_and(is_equal, ops.equal(num_before, 0.0))
    return ops.cast(ops.logical_or(label_logit > max_of_others, is_first), label_logit.dtype)


def _nan_without_label(hit, labels, sum_of_others, max_logit):
    """`hit`, NaN for labels out of range, and 0 beside a NaN: of a row that has one, XLA:CPU may find a maximum."""
    # Of only -inf the sum is NaN too.
    has_nan = ops.logical_and(ops.isnan(sum_of_others), max_logit >= -largest(max_logit))
    return nan_unless(labels >= 0, where_or_zero(hit, ops.logical_not(has_nan)))


def add_dependency(value: Tensor, *others: Any) -> Tensor:
    """`value`, made to depend on the others in a way that XLA does not see through."""
    for other in others:
        value = value + 0.0 * where_or_zero(other, ops.isfinite(other))
    return value
