"""Statistics of the predicted distributions, computed where the logits of a chunk are at hand."""

from typing import Any

from keras import ops

from keras_xent._backend import uses_xla_cpu
from keras_xent._types import Tensor
from keras_xent.kernels import _softmax_row as row
from keras_xent.kernels import sparse_softmax
from keras_xent.kernels._compiled import CompiledKernel
from keras_xent.kernels._dtypes import accumulator_dtype, upcast
from keras_xent.kernels._logarithms import log1p
from keras_xent.kernels._masking import multiply_no_nan
from keras_xent.kernels._options import SoftmaxOptions
from keras_xent.kernels._shapes import as_rows, broadcast_to_rows
from keras_xent.kernels._xla_cpu import map_row_blocks, row_sum

NAMES = ("rank", "hit", "entropy", "logsumexp", "confidence")


def statistics(
    names: tuple[str, ...], logits: Tensor, labels: Tensor, residuals: tuple[Tensor, Tensor], softcap: float | None
) -> tuple[Tensor, ...]:
    """The columns of these names: rank of the label, entropy, log-sum-exp, largest probability (confidence)."""
    max_logit, sum_exp_minus_one = residuals
    columns: dict[str, Any] = {
        "rank": lambda: row.rank_of_label(logits, labels),
        "hit": lambda: is_hit(row.rank_of_label(logits, labels)),
        "entropy": lambda: mean_below_max(logits, labels, *residuals, softcap) + log1p(sum_exp_minus_one),
        "logsumexp": lambda: row.log_sum_exp(max_logit, sum_exp_minus_one, softcap),
        "confidence": lambda: 1.0 / (1.0 + sum_exp_minus_one),
    }
    return tuple(columns[name]() for name in names)


def is_hit(rank: Tensor, top_k: int = 1) -> Tensor:
    """1 for labels among the `top_k` classes of the largest logits, 0 for others; NaN of NaN."""
    return ops.where(ops.isnan(rank), rank, ops.cast(rank < top_k, rank.dtype))


def mean_below_max(
    logits: Tensor, labels: Tensor, max_logit: Tensor, sum_exp_minus_one: Tensor, softcap: float | None
) -> Tensor:
    """`sum_c p_c (max_logit - x_c)`: the entropy is that and `log(1 + sum_exp_minus_one)`, both at least 0.

    The label's term is added apart, so that the exponentials are those that the cross-entropy has summed.
    """
    label = ops.maximum(labels, 0)
    label_logit = ops.take_along_axis(logits, label, axis=1)

    def term(logits, ids):
        below = row.max_minus_logit(upcast(logits), max_logit, softcap)
        return multiply_no_nan(sparse_softmax.exp_shifted_except_label(logits, ids, label, max_logit, softcap), below)

    below = row.max_minus_logit(upcast(label_logit), max_logit, softcap)
    at_label = multiply_no_nan(row.exp_shifted(label_logit, max_logit, softcap), below)
    # Of a row without a distribution the sum is NaN.
    return (row_sum(term, logits, row.class_ids(logits)) + at_label) / (1.0 + sum_exp_minus_one)


def dense_statistics(
    labels: Tensor, logits: Tensor, names: tuple[str, ...], *, axis: int = -1, softcap: float | None = None
) -> tuple[Tensor, ...]:
    """`"nll"` and `NAMES` of these names, of logits `[..., C]`; of the shape of the labels, without gradients.

    Labels are indices of classes, and -1 where there is none; the entropy and the confidence do not need them.
    """
    rank = len(logits.shape)
    columns = _rows(
        as_rows(ops.stop_gradient(logits), rank - 1 if axis == -1 else axis),
        broadcast_to_rows(ops.cast(labels, "int32"), axis, rank),
        names=names,
        softcap=softcap,
    )
    return tuple(ops.reshape(column, ops.shape(labels)) for column in columns)


@CompiledKernel
def _rows(logits, labels, *, names, softcap):
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
