"""Distillation of one language model's head into another's, without the logits of either."""

from dataclasses import dataclass
from typing import Any

from keras import ops

from keras_xent import arguments
from keras_xent._backend import matmul, no_autograph, on_accelerator, on_any_mesh
from keras_xent._named_arguments import named_arguments
from keras_xent._types import DivergenceName, Reduction, Tensor
from keras_xent.kernels._divergence import Divergence, Pair, Softmax
from keras_xent.kernels._dtypes import accumulator_dtype
from keras_xent.kernels._linear_pass import GRADIENTS, OverTokens, checked_matrices, reduced_over_tokens
from keras_xent.kernels._rule import Rule
from keras_xent.kernels._shapes import same_shape
from keras_xent.kernels._softmax_row import max_of_logits


@no_autograph
@named_arguments
@on_any_mesh
def linear_distillation(
    hidden: Tensor,
    kernel: Tensor,
    teacher_hidden: Tensor,
    teacher_kernel: Tensor,
    bias: Tensor = None,
    teacher_bias: Tensor = None,
    *,
    temperature: float = 1.0,
    divergence: DivergenceName = "forward_kl",
    beta: float = 0.5,
    transpose_kernel: bool = False,
    transpose_teacher_kernel: bool = False,
    token_weights: Tensor = None,
    mask: Tensor = None,
    logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    reduction: Reduction | None = "none",
    normalizer: float | None = None,
    training: bool = True,
    gradients: tuple[str, ...] = GRADIENTS,
    low_rank: tuple[Tensor, Tensor] | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Divergence of a student's predicted distributions from a teacher's, both given by their heads.

    For language models: neither model's logits `[tokens, vocabulary]` are materialized, both heads are computed in one
    loop over chunks of tokens, and tokens that are masked cost nothing. The teacher gets no gradient.

    Formula, with `p` the teacher's and `q` the student's softmax of logits divided by the temperature `T`:

    - `"forward_kl"`: `T^2 sum_c p_c (log p_c - log q_c)`, the student covers all that the teacher may say;
    - `"reverse_kl"`: `T^2 sum_c q_c (log q_c - log p_c)`, the student keeps to what the teacher is sure of;
    - `"jensen_shannon"`: `T^2 (beta KL(p || m) + (1 - beta) KL(q || m))` with `m = beta p + (1 - beta) q`.

    `T^2` keeps the size of the gradient the same at all temperatures.

    Equivalent to (forward KL):

        p = keras.ops.softmax(teacher_hidden @ teacher_kernel / T)
        log_q = keras.ops.log_softmax(hidden @ kernel / T)
        losses = T**2 * keras.ops.sum(p * (keras.ops.log(p) - log_q), axis=-1)

    Args:
        hidden, kernel, bias: the student's: `[..., D]`, `[D, V]` (`[V, D]` with `transpose_kernel`), `[V]` or None.
        teacher_hidden, teacher_kernel, teacher_bias: the teacher's: `[..., E]`, `[E, V]` (`[V, E]` with
            `transpose_teacher_kernel`), `[V]` or None.
        temperature: divides the logits of both, after their soft caps.
        divergence: one of the three.
        beta: weight of the teacher in the mixture of Jensen and Shannon, between 0 and 1.
        transpose_kernel, transpose_teacher_kernel: whether the kernels have their classes first.
        low_rank: two factors whose product is added to the kernel, and which get a gradient of their own: `[D, R]` and
            `[R, V]` (`[V, R]` and `[R, D]` with `transpose_kernel`). Neither the product nor its gradient is formed.
        token_weights: weights of the shape of the tokens, or `[B]`, `[B, 1]` for tokens `[B, T]`.
        mask: booleans of the shape of the tokens, or `[B]`; False entries have loss and gradient 0.
        logit_softcap, teacher_logit_softcap: `c` of `c tanh(x / c)`.
        reduction: `"none"`, or one of the reductions of the losses. With one the gradient is formed while the loss is
            computed: four matmuls in all, instead of six.
        normalizer: a number in place of the reduction's denominator.
        training: whether a gradient will be requested. Read on TensorFlow only; it changes no result.
        gradients: which of the inputs need a gradient. Read on TensorFlow only.
        chunk_bytes: memory for a chunk of logits; None to choose it.

    Returns:
        The reduced loss, or losses of the shape of the tokens, float32 (float64 for float64 hidden states).

    Raises:
        ValueError: shapes that do not fit; an argument out of its range.
        NotImplementedError: a second derivative on TensorFlow.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> identity = np.eye(2, dtype="float32")
    >>> teacher, student = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    >>> loss = kx.kernels.linear_distillation(student, identity, teacher, identity)
    >>> round(float(loss[0]), 4)  # (ln 2 + ln (2/3)) / 2
    0.1438

    References: arXiv:1503.02531; the three divergences, arXiv:2306.13649 (GKD).
    """
    student = checked_matrices(hidden, kernel, bias, transpose_kernel, low_rank=low_rank)
    teacher = checked_matrices(teacher_hidden, teacher_kernel, teacher_bias, transpose_teacher_kernel, of="teacher_")
    _check_same_tokens(student, teacher)
    if accumulator_dtype(teacher.hidden) != accumulator_dtype(student.hidden):
        teacher = teacher._replace(hidden=ops.cast(teacher.hidden, accumulator_dtype(student.hidden)))
    temperature = arguments.above_zero("temperature", temperature)
    rule = DistillationRule(
        Divergence(divergence, beta),
        Softmax(temperature, arguments.positive("logit_softcap", logit_softcap)),
        Softmax(temperature, arguments.positive("teacher_logit_softcap", teacher_logit_softcap)),
        teacher.transpose,
    )
    options = OverTokens(mask, token_weights, reduction, normalizer, training, gradients, chunk_bytes)
    return reduced_over_tokens(rule, student, (teacher.hidden,), (teacher.kernel, teacher.bias), options=options)


@dataclass(frozen=True)
class DistillationRule(Rule):
    """Column: the divergence of the student from the teacher, whose hidden states are the rows."""

    divergence: Divergence
    softmax: Softmax
    teacher_softmax: Softmax
    transpose: bool

    num_columns = 1
    num_logits = 2
    has_large_blocks = True

    def prepare(self, rows: Any, constants: Any) -> tuple[Any, Any]:
        """Teacher hidden states and kernel in the dtype that they are multiplied in."""
        (hidden,), (kernel, bias) = rows, constants
        if not on_accelerator():
            hidden = ops.cast(hidden, accumulator_dtype(hidden))
        return (hidden,), (ops.cast(kernel, hidden.dtype), bias)

    def arrays(self, rows: Any, constants: Any) -> tuple[Tensor, ...]:
        """The teacher's logits of a chunk."""
        (hidden,), (kernel, bias) = rows, constants
        logits = matmul(hidden, kernel, transpose_b=self.transpose)  # [n, V]
        return (logits if bias is None else logits + ops.cast(bias, logits.dtype),)

    def row_maxima(self, logits: Tensor, arrays: Any) -> tuple[Tensor, ...]:
        """The largest logits of the teacher and the student."""
        return max_of_logits(*arrays), max_of_logits(logits)

    def forward(self, logits: Tensor, arrays: Any, constants: Any) -> tuple[tuple[Tensor, ...], Any]:
        """The divergence of each token, and what the gradient needs of the rows."""
        teacher, teacher_max, max_logit = arrays
        normalizers = self.teacher_softmax.normalize(teacher, teacher_max), self.softmax.normalize(logits, max_logit)
        loss, mean = self.divergence.of_rows(self._pair(logits, teacher, normalizers))
        return (self.softmax.temperature**2 * loss,), (normalizers, mean)

    def backward(self, upstream: Tensor, residuals: Any, logits: Tensor, arrays: Any, constants: Any) -> Tensor:
        """The gradient for the student's logits."""
        teacher, *_ = arrays
        normalizers, mean = residuals
        gradient = self.divergence.gradient(self._pair(logits, teacher, normalizers), mean)
        return self.softmax.gradient(gradient, self.softmax.temperature**2 * upstream, logits)

    def _pair(self, logits, teacher, normalizers):
        return Pair.of(teacher, logits, (self.teacher_softmax, self.softmax), normalizers)


def _check_same_tokens(student, teacher):
    if not same_shape(teacher.hidden.shape[:-1], student.hidden.shape[:-1]):
        raise ValueError(
            "`teacher_hidden` must have the shape of `hidden` but for the last axis. "
            f"Received: teacher_hidden of shape {tuple(teacher.hidden.shape)} and hidden of shape "
            f"{tuple(student.hidden.shape)}."
        )
    if teacher.num_classes != student.num_classes:
        raise ValueError(
            "`teacher_kernel` must have the classes of `kernel`, of one vocabulary. "
            f"Received: {teacher.num_classes} and {student.num_classes} classes."
        )
