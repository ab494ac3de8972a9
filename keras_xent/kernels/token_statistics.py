"""Log-probability, entropy, log-sum-exp and rank of each token, computed from a head without storing its logits."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from keras import ops

from keras_xent import arguments
from keras_xent._backend import no_autograph, on_any_mesh, take_at_columns, uses_xla_cpu
from keras_xent._named_arguments import named_arguments
from keras_xent._types import Tensor
from keras_xent.kernels import _exponentials, sparse_softmax
from keras_xent.kernels import _row_statistics as row_statistics
from keras_xent.kernels import _softmax_row as row
from keras_xent.kernels._dtypes import upcast
from keras_xent.kernels._labels import class_indices, valid_mask
from keras_xent.kernels._linear_loop import Data
from keras_xent.kernels._linear_pass import Matrices, checked_matrices, values
from keras_xent.kernels._masking import multiply_no_nan, where_or_zero
from keras_xent.kernels._options import SoftmaxOptions
from keras_xent.kernels._rule import ColumnsAndGradient, Rule
from keras_xent.kernels.linear import checked_labels


class TokenStatistics(NamedTuple):
    """Statistics of each token: arrays of the shape of the labels, 0 where a token is not valid.

    They are float32, or float64 for float64 hidden states.

    Attributes:
        log_prob: log-probability of the label, at most 0.
        entropy: entropy of the predicted distribution, in nats.
        logsumexp: logarithm of the sum of the exponentials of the logits.
        rank: number of classes with larger logits than the label (equal ones before it included); without gradient.
    """

    log_prob: Tensor
    entropy: Tensor
    logsumexp: Tensor
    rank: Tensor


@no_autograph
@named_arguments
@on_any_mesh
def linear_token_statistics(
    hidden: Tensor,
    kernel: Tensor,
    labels: Tensor,
    bias: Tensor = None,
    *,
    temperature: float = 1.0,
    transpose_kernel: bool = False,
    mask: Tensor = None,
    ignore_class: int | None = None,
    logit_softcap: float | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    chunk_bytes: int | None = None,
) -> TokenStatistics:
    """Log-probability of the label, entropy, log-sum-exp and the label's rank of each token, without the logits.

    For preference tuning, policy optimization, entropy bonuses, and scoring. The first three are differentiable in
    `hidden`, `kernel` and `bias`; the backward pass computes the logits again, chunk by chunk.

    Formula, with `x = cap(hidden @ kernel + bias) / temperature` and `p = softmax(x)`: `x_k - log sum exp x`,
    `-sum_c p_c log p_c`, `log sum exp x`, and how many `x_c` come before `x_k`.

    Args:
        hidden: hidden states `[..., D]`, bfloat16, float16, float32 or float64.
        kernel: `[D, V]`, or `[V, D]` with `transpose_kernel`.
        labels: integers `[...]`.
        bias: `[V]`, or None.
        temperature: divides the logits, after the soft cap.
        transpose_kernel: whether the kernel is `[V, D]`.
        low_rank: two factors whose product is added to the kernel, and which get a gradient of their own: `[D, R]` and
            `[R, V]` (`[V, R]` and `[R, D]` with `transpose_kernel`). Neither the product nor its gradient is formed.
        mask: booleans of the shape of `labels`, or `[B]`; False entries give 0 and gradient 0 whatever lies under them,
            and cost nothing.
        ignore_class: a label that is masked in the same way.
        logit_softcap: `c` of `c tanh(x / c)`.
        chunk_bytes: the most memory that a chunk of logits may take; None: chosen.

    Returns:
        `TokenStatistics(log_prob, entropy, logsumexp, rank)`, each of the shape of `labels`. `log_prob` is never above
        0. A label out of range, where no error can be raised, gives NaN.

    Raises:
        ValueError: shapes that do not fit; in eager mode, a label out of range.
        InvalidArgumentError: the latter in a TensorFlow graph on the CPU.
        NotImplementedError: a second derivative on TensorFlow.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> hidden, kernel = np.eye(2, dtype="float32"), np.log([[0.2, 0.8], [0.5, 0.5]]).astype("float32")
    >>> statistics = kx.kernels.linear_token_statistics(hidden, kernel, np.array([1, 0]))
    >>> [round(float(x), 4) for x in statistics.log_prob]  # ln 0.8 and ln 0.5
    [-0.2231, -0.6931]
    >>> [round(float(x), 4) for x in statistics.entropy]
    [0.5004, 0.6931]

    References: entropy from the head in chunks, arXiv:2409.19256 (verl).
    """
    rule = StatisticsRule.of(temperature, logit_softcap)
    matrices = checked_matrices(hidden, kernel, bias, transpose_kernel, low_rank=low_rank)
    return TokenStatistics(*token_columns(rule, matrices, labels, mask, ignore_class, chunk_bytes=chunk_bytes))


@dataclass(frozen=True)
class StatisticsRule(Rule):
    """Columns: log-probability, with `everything` also entropy, log-sum-exp and rank, of logits times `scale`."""

    scale: float = 1.0
    # Of the scaled logits.
    softcap: float | None = None
    everything: bool = True
    has_rank: bool = True

    @classmethod
    def of(cls, temperature: float, logit_softcap: float | None, *, everything: bool = True) -> "StatisticsRule":
        """The rule of a temperature that divides after the soft cap, and of the cap."""
        temperature = arguments.above_zero("temperature", temperature)
        softcap = arguments.positive("logit_softcap", logit_softcap)
        # c tanh(x / c) / T is the cap c / T of x / T.
        return cls(1.0 / temperature, softcap and float(softcap) / temperature, everything, everything)

    @property
    def num_values(self) -> int:  # type: ignore[override]
        """The number of columns with a gradient."""
        return 3 if self.everything else 1

    @property
    def num_columns(self) -> int:  # type: ignore[override]
        """The number of columns."""
        return self.num_values + self.has_rank

    def values_only(self) -> "StatisticsRule":
        """The rule without the rank."""
        return replace(self, has_rank=False)

    def forward(self, logits: Tensor, arrays: Any, constants: Any) -> tuple[tuple[Tensor, ...], Any]:
        """The columns, and the residuals of the rows."""
        (labels,) = arrays
        x = self._scaled(logits)
        nll, residuals = sparse_softmax.forward(x, labels, options=SoftmaxOptions(logit_softcap=self.softcap))
        columns: tuple[Tensor, ...] = (log_prob_of(nll),)
        if not self.everything:
            return columns, (*residuals, None)
        max_logit, sum_exp_minus_one = residuals
        entropy = row_statistics.entropy_of_logits(x, labels, max_logit, sum_exp_minus_one, self.softcap)
        columns += (entropy, row.log_sum_exp(max_logit, sum_exp_minus_one, self.softcap))
        if self.has_rank:
            columns += (row.rank_of_label(logits, labels),)
        return columns, (*residuals, entropy - ops.log1p(sum_exp_minus_one))

    def backward(self, upstream: Tensor, residuals: Any, logits: Tensor, arrays: Any, constants: Any) -> Tensor:
        """The gradient for the logits: `u (1 - p)` at the label, and `p (w - u - v (log p + H))` elsewhere."""
        (labels,) = arrays
        max_logit, sum_exp_minus_one, mean_below = residuals
        any_upstream = ops.sum(ops.abs(upstream), axis=1, keepdims=True)
        dead = row.is_dead_row(any_upstream, max_logit, sum_exp_minus_one)
        max_logit, sum_exp_minus_one, x = row.zero_rows(dead, max_logit, sum_exp_minus_one, self._scaled(logits))
        label = ops.maximum(labels, 0)
        is_label = ops.equal(row.class_ids(x), labels)
        below = row.max_minus_logit(upcast(x), max_logit, self.softcap)
        p = ops.exp(-below) / (1.0 + sum_exp_minus_one)
        u = upstream[:, 0:1]
        of_all: Tensor = 0.0 * u
        if self.everything:
            (mean_below,) = row.zero_rows(dead, mean_below)
            v, w = upstream[:, 1:2], upstream[:, 2:3]
            from_mean = below - mean_below
            if uses_xla_cpu():
                # log p + H has the mean 0: what a mean of many terms has rounded is in the rest of the sum of its
                # parts. Accelerators sum in parts from the start.
                from_mean = from_mean - ops.sum(multiply_no_nan(p, from_mean), axis=1, keepdims=True)
            of_all = w + multiply_no_nan(v, from_mean)
        nll = row.nll(take_at_columns(x, label), max_logit, sum_exp_minus_one, self.softcap)
        # 1 - p of the label, exact where p has rounded to 1.
        at_label = -u * ops.expm1(-nll) + where_or_zero(multiply_no_nan(p, of_all), is_label)
        gradient = ops.where(is_label, at_label, multiply_no_nan(p, of_all - u))
        return row.to_logits_dtype(self.scale * gradient, dead, x, self.softcap)

    def row_scaled(self, upstream: Tensor, logits: Tensor, arrays: Any, constants: Any) -> ColumnsAndGradient | None:
        """The columns or the gradient, from exponentials in the memory of the logits."""
        if self.softcap is not None:
            return None
        (labels,) = arrays
        if upstream is not None and self.everything:
            found = _exponentials.of_labels(logits, labels, scale=self.scale, statistics=("entropy",))
            # What was computed in the forward pass is not read again.
            columns = (log_prob_of(found.nll),) * self.num_columns
            return columns, found.gradient_of_statistics(labels, self.scale * upstream)
        names = ("entropy", "logsumexp") * self.everything + ("rank",) * self.has_rank
        found = _exponentials.of_labels(logits, labels, scale=self.scale, statistics=names)
        gradient = found.gradient(labels, None if upstream is None else -self.scale * upstream)
        return (log_prob_of(found.nll), *found.statistics), gradient

    def _scaled(self, logits):
        return logits if self.scale == 1.0 else logits * self.scale


def log_prob_of(nll: Tensor) -> Tensor:
    """The log-probability of a label, never above 0."""
    # Not a minimum, which XLA:CPU may take of NaN and a number.
    return ops.where(nll > 0, -nll, 0.0 * nll)


def indices_of(labels: Tensor, num_classes: int, mask: Tensor, ignore_class: int | None) -> tuple[Tensor, Tensor]:
    """The labels as indices `[N, 1]`, and which of them are valid `[N, 1]`; None: all."""
    valid = valid_mask(labels, mask, ignore_class)
    if valid is not None:
        valid = ops.broadcast_to(valid, ops.shape(labels))
    indices = ops.reshape(class_indices(labels, num_classes, valid), (-1, 1))
    return indices, None if valid is None else ops.reshape(valid, (-1, 1))


def token_columns(
    rule: StatisticsRule,
    matrices: Matrices,
    labels: Tensor,
    mask: Tensor,
    ignore_class: int | None = None,
    *,
    constants: tuple[Tensor, ...] = (),
    **options: Any,
) -> tuple[Tensor, ...]:
    """The columns of the rule, of the shape of the labels; `options` are those of `values`."""
    labels = checked_labels(labels, matrices.hidden)
    indices, is_active = indices_of(labels, matrices.num_classes, mask, ignore_class)  # [N, 1]
    data = Data(is_active, (indices,), constants)
    found, others = values(rule, matrices, data, **options)  # [N, num_values], [N, 1]
    columns = (*(found[:, i] for i in range(rule.num_values)), *others)
    return tuple(ops.reshape(column, ops.shape(labels)) for column in columns)
