"""Statistics of the predicted distributions, computed where the logits of a chunk are at hand."""

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_xent._backend import uses_xla_cpu
from keras_xent._types import Tensor
from keras_xent.kernels import _softmax_row as row
from keras_xent.kernels import sparse_softmax
from keras_xent.kernels._compiled import CompiledKernel
from keras_xent.kernels._dtypes import accumulator_dtype, upcast
from keras_xent.kernels._logarithms import log1p
from keras_xent.kernels._masking import multiply_no_nan, where_or_zero
from keras_xent.kernels._options import SoftmaxOptions
from keras_xent.kernels._shapes import as_rows, broadcast_to_rows
from keras_xent.kernels._xla_cpu import map_row_blocks, row_sum

NAMES = ("rank", "hit", "entropy", "logsumexp", "confidence")
# Of a sure row, the largest logit's exponential is above, and all others' below. It is 1, unless the logits that the
# maximum was taken of were rounded in another way: XLA computes quotients again where it reads them (JAX 0.10).
OF_LARGEST = 0.75


def statistics(
    names: tuple[str, ...], logits: Tensor, labels: Tensor, residuals: tuple[Tensor, Tensor], softcap: float | None
) -> tuple[Tensor, ...]:
    """The columns of these `NAMES`, which `LossStatistics` explains."""
    max_logit, sum_exp_minus_one = residuals
    columns: dict[str, Any] = {
        "rank": lambda: row.rank_of_label(logits, labels),
        "hit": lambda: is_hit(row.rank_of_label(logits, labels)),
        "entropy": lambda: entropy_of_logits(logits, labels, *residuals, softcap),
        "logsumexp": lambda: row.log_sum_exp(max_logit, sum_exp_minus_one, softcap),
        "confidence": lambda: 1.0 / (1.0 + sum_exp_minus_one),
    }
    return tuple(columns[name]() for name in names)


def is_hit(rank: Tensor, top_k: int = 1) -> Tensor:
    """1 for labels among the `top_k` classes of the largest logits, 0 for others; NaN of NaN."""
    return ops.where(ops.isnan(rank), rank, ops.cast(rank < top_k, rank.dtype))


def entropy(sum_of: Callable[[Tensor], Tensor], sum_exp_minus_one: Tensor) -> Tensor:
    """`sum_c p_c (max_logit - x_c) + log(1 + sum_exp_minus_one)`, both at least 0.

    With `exp_c = exp(x_c - max_logit)`, `sum_of(share)` is to give
    `sum_c exp_c (max_logit - x_c + share [exp_c < OF_LARGEST])`.

    Of a row that is sure of another class than the label, `s = sum_exp_minus_one` has lost its digits: the 1 was
    subtracted after the sum. There `log(1 + s)` is `share s / (1 + s)`, of which the share, about 1, has its digits,
    and `s` is summed without the 1 beside the rest.
    """
    # Below 1/2 one exponential alone is above `OF_LARGEST`.
    is_sure = sum_exp_minus_one < 0.5
    log_sum = log1p(sum_exp_minus_one)
    is_positive = sum_exp_minus_one > 0
    one = ops.ones((), sum_exp_minus_one.dtype)
    ratio = ops.where(is_positive, log_sum / ops.where(is_positive, sum_exp_minus_one, one), one)
    sum_exp = 1.0 + sum_exp_minus_one
    total = sum_of(where_or_zero(sum_exp * ratio, is_sure))
    return total / sum_exp + where_or_zero(log_sum, ops.logical_not(is_sure))


def without_largest(exp_shifted: Tensor) -> Tensor:
    """The exponentials of a sure row without that of the largest logit."""
    return where_or_zero(exp_shifted, exp_shifted < OF_LARGEST)


def entropy_of_logits(
    logits: Tensor, labels: Tensor, max_logit: Tensor, sum_exp_minus_one: Tensor, softcap: float | None
) -> Tensor:
    """The entropy of rows `[n, C]`.

    The label's term is added apart, so that the exponentials are those that the cross-entropy has summed.
    """
    label = ops.maximum(labels, 0)
    label_logit = ops.take_along_axis(logits, label, axis=1)

    ids, label_exp = row.class_ids(logits), row.exp_shifted(label_logit, max_logit, softcap)

    def exp_of_others(logits, ids):
        return sparse_softmax.exp_shifted_except_label(logits, ids, label, max_logit, softcap)

    def below(exp_shifted, logits, share=None):
        difference = row.max_minus_logit(upcast(logits), max_logit, softcap)
        if share is not None:
            difference = difference + where_or_zero(share, exp_shifted < OF_LARGEST)
        return multiply_no_nan(exp_shifted, difference)

    def sum_of(share):
        of_others = row_sum(lambda x, ids, share: below(exp_of_others(x, ids), x, share), logits, ids, share)
        return of_others + below(label_exp, label_logit, share)

    if uses_xla_cpu():
        # Of a row without a distribution the sum is NaN.
        return entropy(sum_of, sum_exp_minus_one)
    # The same from two sums that do not wait for a share of a third: XLA computes all three in one pass.
    total = row_sum(lambda x, ids: below(exp_of_others(x, ids), x), logits, ids) + below(label_exp, label_logit)
    others = row_sum(lambda x, ids: without_largest(exp_of_others(x, ids)), logits, ids) + without_largest(label_exp)
    log_sum = log1p(sum_exp_minus_one)
    lost = where_or_zero(log1p(others) - log_sum, sum_exp_minus_one < 0.5)
    # `others` has not the derivative of the largest.
    return total / (1.0 + sum_exp_minus_one) + (log_sum + ops.stop_gradient(lost))


def dense_statistics(
    labels: Tensor, logits: Tensor, names: tuple[str, ...], *, axis: int = -1, softcap: float | None = None
) -> tuple[Tensor, ...]:
    """`"nll"` and `NAMES` of these names, of logits `[..., C]`; of the shape of the labels, without gradients.

    Labels are indices of classes, and -1 where there is none; the entropy and the confidence do not need them.
    """
    rank = len(logits.shape)
    columns = _statistics_of_rows(
        as_rows(ops.stop_gradient(logits), rank - 1 if axis == -1 else axis),
        broadcast_to_rows(ops.cast(labels, "int32"), axis, rank),
        names=names,
        softcap=softcap,
    )
    return tuple(ops.reshape(column, ops.shape(labels)) for column in columns)


@CompiledKernel
def _statistics_of_rows(logits, labels, *, names, softcap):
    def on_block(logits, labels):
        nll, residuals = sparse_softmax.forward(
            logits, ops.maximum(labels, 0), options=SoftmaxOptions(logit_softcap=softcap)
        )
        others = tuple(name for name in names if name != "nll")
        found = dict(zip(others, statistics(others, logits, labels, residuals, softcap), strict=True), nll=nll)
        return tuple(found[name] for name in names)

    if not uses_xla_cpu() or len(logits.shape) > 2:
        return on_block(logits, labels)
    column = ops.zeros((ops.shape(logits)[0], 1), accumulator_dtype(logits))
    return map_row_blocks(on_block, (logits, labels), (column,) * len(names))
