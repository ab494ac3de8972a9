"""Statistics of the predicted distributions, computed where the logits of a chunk are at hand."""

from typing import Any

from keras import ops

from keras_xent._types import Tensor
from keras_xent.kernels import _softmax_row as row
from keras_xent.kernels._dtypes import upcast
from keras_xent.kernels._masking import multiply_no_nan
from keras_xent.kernels._xla_cpu import row_sum

NAMES = ("rank", "entropy", "logsumexp", "confidence")


def statistics(
    names: tuple[str, ...], logits: Tensor, labels: Tensor, residuals: tuple[Tensor, Tensor], softcap: float | None
) -> tuple[Tensor, ...]:
    """The columns of these names: rank of the label, entropy, log-sum-exp, largest probability (confidence)."""
    max_logit, sum_exp_minus_one = residuals
    columns: dict[str, Any] = {
        "rank": lambda: row.rank_of_label(logits, labels),
        "entropy": lambda: mean_below_max(logits, *residuals, softcap) + ops.log1p(sum_exp_minus_one),
        "logsumexp": lambda: row.log_sum_exp(max_logit, sum_exp_minus_one, softcap),
        "confidence": lambda: 1.0 / (1.0 + sum_exp_minus_one),
    }
    return tuple(columns[name]() for name in names)


def mean_below_max(logits: Tensor, max_logit: Tensor, sum_exp_minus_one: Tensor, softcap: float | None) -> Tensor:
    """`sum_c p_c (max_logit - x_c)`: the entropy is that and `log(1 + sum_exp_minus_one)`, both at least 0."""

    def term(logits):
        below = row.max_minus_logit(upcast(logits), max_logit, softcap)
        return multiply_no_nan(ops.exp(-below), below)

    # Of a row without a distribution the sum is NaN.
    return row_sum(term, logits) / (1.0 + sum_exp_minus_one)
