"""Distillation of a teacher that is known by its likeliest classes, without the student's logits."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from keras_xent import _words, arguments
from keras_xent._backend import add_at_columns, is_eager, no_autograph, on_accelerator, on_any_mesh, take_at_columns
from keras_xent._named_arguments import named_arguments
from keras_xent._types import Reduction, Tensor
from keras_xent.kernels import _exponentials
from keras_xent.kernels._divergence import Softmax
from keras_xent.kernels._dtypes import accumulator_dtype, dtype_of, is_float, to_tensor
from keras_xent.kernels._exponentials import LogitGradient
from keras_xent.kernels._labels import class_indices, equals_ignored
from keras_xent.kernels._linear_pass import GRADIENTS, OverTokens, checked_matrices, reduced_over_tokens
from keras_xent.kernels._masking import multiply_no_nan, nan_unless, where_or_zero
from keras_xent.kernels._rule import ColumnsAndGradient, Rule
from keras_xent.kernels._shapes import align_weights, same_shape


@no_autograph
@named_arguments
@on_any_mesh
def linear_top_k_distillation(
    hidden: Tensor,
    kernel: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    bias: Tensor = None,
    *,
    temperature: float = 1.0,
    transpose_kernel: bool = False,
    token_weights: Tensor = None,
    mask: Tensor = None,
    logit_softcap: float | None = None,
    reduction: Reduction | None = "none",
    normalizer: float | None = None,
    training: bool = True,
    gradients: tuple[str, ...] = GRADIENTS,
    low_rank: tuple[Tensor, Tensor] | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Forward KL of a student from a teacher that is known by its K likeliest classes: for teachers stored on disk.

    Formula, with `q` the student's softmax of logits divided by `T`, and `p_i = exp(log_probs_i)` of the K classes:
    `T^2 sum_i p_i (log p_i - log q_{c_i})`. What the teacher gives to other classes is left out: to have it as a
    distribution, normalize `log_probs` first. A class that comes twice adds two terms, and its gradient is that of the
    sum of its probabilities: K classes drawn from the teacher, with `log_probs` of `-log(K)`, have the gradient of the
    whole teacher in expectation.

    Args:
        hidden, kernel, bias: the student's: `[..., D]`, `[D, V]` (`[V, D]` with `transpose_kernel`), `[V]` or None.
        ids: integers `[..., K]`, the teacher's classes; -1 marks padding, where a token has fewer than K. Means leave
            out a token of -1 alone.
        log_probs: `[..., K]`, the teacher's log-probabilities at temperature `T`.
        temperature: divides the student's logits, after the soft cap.
        transpose_kernel: whether the kernel has its classes first.
        low_rank: two factors whose product is added to the kernel, and which get a gradient of their own: `[D, R]` and
            `[R, V]` (`[V, R]` and `[R, D]` with `transpose_kernel`). Neither the product nor its gradient is formed.
        token_weights: weights of the shape of the tokens, or `[B]`, `[B, 1]` for tokens `[B, T]`.
        mask: booleans of the shape of the tokens, or `[B]`; False entries have loss and gradient 0.
        logit_softcap: `c` of `c tanh(x / c)`, for the student's logits.
        reduction: `"none"`, or one of the reductions of the losses. With one the gradient is formed while the loss is
            computed: three matmuls in all, instead of four.
        normalizer: a number in place of the reduction's denominator.
        training: whether a gradient will be requested. Read on TensorFlow only; it changes no result.
        gradients: which of the inputs need a gradient. Read on TensorFlow only.
        chunk_bytes: memory for a chunk of logits; None to choose it.

    Returns:
        The reduced loss, or losses of the shape of the tokens.

    Raises:
        ValueError: shapes that do not fit; an argument out of its range; in eager mode, a class that the student does
            not have, or log-probabilities above 0.
        InvalidArgumentError: such a class in a TensorFlow graph on the CPU. Where no error can be raised it gives NaN.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> identity, student = np.eye(2, dtype="float32"), np.log([[0.25, 0.75]])
    >>> loss = kx.kernels.linear_top_k_distillation(student, identity, [[1]], np.log([[0.5]]))
    >>> round(float(loss[0]), 4)  # (ln 0.5 - ln 0.75) / 2
    -0.2027

    References: arXiv:2503.16870 (sparse logits for distillation, and why to draw them).
    """
    student = checked_matrices(hidden, kernel, bias, transpose_kernel, low_rank=low_rank)
    ids = to_tensor(ids, "ids")
    log_probs = ops.cast(to_tensor(log_probs, "log_probs"), accumulator_dtype(student.hidden))
    for name, one in (("ids", ids), ("log_probs", log_probs)):
        if not same_shape(one.shape[:-1], student.hidden.shape[:-1]) or not same_shape(one.shape, ids.shape):
            raise ValueError(
                f"`{name}` must have the shape of `hidden` but for the last axis, K of one size with the other. "
                f"Received: ids of shape {tuple(ids.shape)}, log_probs of shape {tuple(log_probs.shape)} and hidden of "
                f"shape {tuple(student.hidden.shape)}."
            )
    if not ids.shape[-1]:
        raise ValueError(f"`ids` must hold at least one class for each token. Received: shape {tuple(ids.shape)}.")
    has_class = ops.any(ops.logical_not(equals_ignored(ids, -1)), axis=-1)
    ids, log_probs = _checked_classes(ids, log_probs, student.num_classes, mask, token_weights)
    softcap = arguments.positive("logit_softcap", logit_softcap)
    rule = TopKDistillationRule(Softmax(arguments.above_zero("temperature", temperature), softcap))
    options = OverTokens(mask, token_weights, reduction, normalizer, training, gradients, chunk_bytes, has_class)
    return reduced_over_tokens(rule, student, (ids, log_probs), options=options)


def _checked_classes(ids, log_probs, num_classes, mask, token_weights):
    """The classes as indices and their log-probabilities: of padding -inf, NaN where a class is out of range."""
    if is_float(ids):
        raise ValueError(f"`ids` must be integers, classes of the teacher. Received: dtype {dtype_of(ids)}.")
    is_class = counts = ops.logical_not(equals_ignored(ids, -1))
    for name, one in (("mask", mask), ("token_weights", token_weights)):
        if one is not None:
            is_used = align_weights(ops.cast(to_tensor(one, name), "bool"), ids.shape[:-1], name)
            counts = ops.logical_and(counts, ops.expand_dims(is_used, -1))
    with _words.named("ids", "kernel", padding="or a class that only the teacher has, replace it with -1"):
        indices = class_indices(ids, num_classes, counts)
    if is_eager(log_probs) and is_eager(counts) and not on_accelerator():
        highest = np.max(ops.convert_to_numpy(ops.where(counts, log_probs, -math.inf)), initial=-math.inf)
        # Those of 16-bit floats may be rounded to a little above 0.
        if highest > 0.01:
            raise ValueError(
                f"`log_probs` must be logarithms of probabilities, at most 0. Received: {highest:.3g}. Of "
                "probabilities take the logarithm, of logits the log-softmax."
            )
    log_probs = ops.where(is_class, ops.stop_gradient(log_probs), -math.inf)
    return ops.maximum(indices, 0), nan_unless(indices >= 0, log_probs)


@dataclass(frozen=True)
class TopKDistillationRule(Rule):
    """Column: the divergence from K classes; the rows are their numbers and log-probabilities."""

    softmax: Softmax

    num_columns = 1
    num_rows = 2

    def forward(self, logits: Tensor, arrays: Any, constants: Any) -> tuple[tuple[Tensor, ...], Any]:
        """The divergence of each token, and what the gradient needs of the rows."""
        ids, log_p = arrays
        normalizer = self.softmax.normalize(logits)
        log_q = self.softmax.log_prob(take_at_columns(logits, ids), normalizer)  # [n, K]
        return (self._loss(log_q, log_p),), normalizer

    def backward(self, upstream: Tensor, residuals: Any, logits: Tensor, arrays: Any, constants: Any) -> Tensor:
        """The gradient for the logits: `q sum_i p_i - p`."""
        ids, log_p = arrays
        p = ops.exp(log_p)
        q = self.softmax.prob(logits, residuals)
        gradient = add_at_columns(q * ops.sum(p, axis=1, keepdims=True), ids, -p)
        return self.softmax.gradient(gradient, self.softmax.temperature**2 * upstream, logits)

    def row_scaled(self, upstream: Tensor, logits: Tensor, arrays: Any, constants: Any) -> ColumnsAndGradient | None:
        """The same from exponentials in the memory of the logits."""
        if self.softmax.softcap is not None:
            return None
        ids, log_p = arrays
        max_logit, of_classes = ops.max(logits, axis=1, keepdims=True), take_at_columns(logits, ids)
        inverse = 1.0 / self.softmax.temperature
        exp_shifted = _exponentials.in_place(
            logits, max_logit, scale=inverse, read_before=(ops.sum(of_classes, axis=1, keepdims=True),)
        )
        normalizer = self.softmax.normalizer(max_logit, ops.sum(exp_shifted, axis=1, keepdims=True))
        loss = self._loss(self.softmax.log_prob(of_classes, normalizer), log_p)
        if upstream is None:
            return (loss,), None
        p, is_used = ops.exp(log_p), ops.not_equal(upstream, 0.0)
        sum_p = ops.sum(p, axis=1, keepdims=True)
        # The gradient `q sum_i p_i - p` is the matrix times `sum_i p_i / sum_exp`; without a class both are 0.
        has_class = ops.logical_and(is_used, sum_p > 0)
        # Divided by the sum first: the quotient of the sums is infinite where the teacher gives all K next to nothing.
        share = where_or_zero(p / ops.where(has_class, sum_p, 1.0), has_class)
        matrix = add_at_columns(exp_shifted, ids, -share * normalizer.sum_exp)
        factors = self.softmax.temperature * upstream * sum_p / normalizer.sum_exp
        return (loss,), LogitGradient(matrix, where_or_zero(factors, is_used))

    def _loss(self, log_q, log_p):
        return self.softmax.temperature**2 * ops.sum(
            multiply_no_nan(ops.exp(log_p), log_p - log_q), axis=1, keepdims=True
        )
