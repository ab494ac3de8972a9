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


def entropy(sum_of: Callable, sum_exp_minus_one: Tensor, multiply: Callable = ops.multiply) -> Tensor:
    """`sum_c p_c (max_logit - x_c) + log(1 + sum_exp_minus_one)`, both at least 0.

    With `exp_c = exp(x_c - max_logit)`, `sum_of(term, *columns)` is to give
    `sum_c term(exp_c, max_logit - x_c, *columns)`. `multiply` is for the two.

    Of a row that is sure of another class than the label, `s = sum_exp_minus_one` has lost its digits: the 1 was
    subtracted after the sum. There `log(1 + s)` is computed from a sum without the largest exponential.
    """
    # Below 1/2 one exponential alone is above `OF_LARGEST`.
    is_sure = sum_exp_minus_one < 0.5
    log_sum, sum_exp = log1p(sum_exp_minus_one), 1.0 + sum_exp_minus_one
    if not uses_xla_cpu():
        # Two sums that do not wait for each other: XLA computes both in one pass.
        total = sum_of(multiply)
        others = sum_of(lambda exp, _: where_or_zero(exp, exp < OF_LARGEST))
        lost = where_or_zero(log1p(others) - log_sum, is_sure)
        # `others` has not the derivative of the largest.
        return total / sum_exp + (log_sum + ops.stop_gradient(lost))
    # One sum: `log(1 + s)` is `share s / (1 + s)`, of which the share, about 1, has its digits.
    is_positive = sum_exp_minus_one > 0
    one = ops.ones((), sum_exp_minus_one.dtype)
    ratio = ops.where(is_positive, log_sum / ops.where(is_positive, sum_exp_minus_one, one), one)
    total = sum_of(
        lambda exp, below, share: multiply(exp, below + where_or_zero(share, exp < OF_LARGEST)),
        where_or_zero(sum_exp * ratio, is_sure),
    )
    return total / sum_exp + where_or_zero(log_sum, ops.logical_not(is_sure))


def entropy_of_logits(
    logits: Tensor, labels: Tensor, max_logit: Tensor, sum_exp_minus_one: Tensor, softcap: float | None
) -> Tensor:
    """The entropy of rows `[n, C]`.

    The label's term is added apart, so that the exponentials are those that the cross-entropy has summed.
    """
    label = ops.maximum(labels, 0)
    label_logit, ids = ops.take_along_axis(logits, label, axis=1), row.class_ids(logits)

    def below(x):
        return row.max_minus_logit(upcast(x), max_logit, softcap)

    def sum_of(term, *columns):
        def of_others(x, ids, *columns):
            exp = sparse_softmax.exp_shifted_except_label(x, ids, label, max_logit, softcap)
            return term(exp, below(x), *columns)

        of_label = term(row.exp_shifted(label_logit, max_logit, softcap), below(label_logit), *columns)
        return row_sum(of_others, logits, ids, *columns) + of_label

    # Of a row without a distribution the sum is NaN.
    return entropy(sum_of, sum_exp_minus_one, multiply_no_nan)


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
