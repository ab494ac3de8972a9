"""The likeliest classes of each token and their log-probabilities, computed from a head without storing its logits."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from keras import ops

from keras_xent import arguments
from keras_xent._backend import no_autograph, on_any_mesh, on_tpu, opaque, take_at_columns
from keras_xent._named_arguments import named_arguments
from keras_xent._types import Tensor
from keras_xent.kernels import _linear_loop
from keras_xent.kernels import _softmax_row as row
from keras_xent.kernels._linear_loop import Data
from keras_xent.kernels._linear_pass import checked_matrices, static_options
from keras_xent.kernels._rule import ColumnsAndGradient, Rule
from keras_xent.kernels._shapes import align_weights
from keras_xent.kernels.token_statistics import StatisticsRule

# The first integer that float32, in which the loop returns its columns, cannot hold is one more than this.
MOST_CLASSES = 2**24
# Classes are compared in blocks of so many, if there are so many blocks for each class that is returned.
BLOCK, MIN_BLOCKS = 32, 4


class TopK(NamedTuple):
    """The likeliest classes of each token, the likeliest first.

    Attributes:
        ids: int32 `[..., K]`: classes; of equal ones the first. -1 where a token is not valid.
        log_probs: their log-probabilities `[..., K]`, float32, or float64 for float64 hidden states; 0 where a token is
            not valid.
    """

    ids: Tensor
    log_probs: Tensor


@no_autograph
@named_arguments
@on_any_mesh
def linear_top_k(
    hidden: Tensor,
    kernel: Tensor,
    k: int,
    bias: Tensor = None,
    *,
    temperature: float = 1.0,
    transpose_kernel: bool = False,
    mask: Tensor = None,
    logit_softcap: float | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    chunk_bytes: int | None = None,
) -> TopK:
    """The `k` likeliest classes of each token and their log-probabilities, without the logits.

    What `linear_top_k_distillation` takes, and what servers of language models call `top_logprobs`. Without a gradient.

    Equivalent to:

        log_probs, ids = ops.top_k(ops.log_softmax(logits / temperature), k)

    Args:
        hidden: hidden states `[..., D]`, bfloat16, float16, float32 or float64.
        kernel: `[D, V]`, or `[V, D]` with `transpose_kernel`.
        k: how many classes.
        bias: `[V]`, or None.
        temperature: divides the logits, after the soft cap.
        transpose_kernel: whether the kernel is `[V, D]`.
        mask: booleans of the shape of `hidden` without its last axis, or `[B]`; what lies under False costs nothing.
        logit_softcap: `c` of `c tanh(x / c)`.
        low_rank: two factors whose product is added to the kernel: `[D, R]` and `[R, V]` (`[V, R]` and `[R, D]` with
            `transpose_kernel`). The product is not formed.
        chunk_bytes: the most memory that a chunk of logits may take; None: chosen.

    Returns:
        `TopK(ids, log_probs)`, each `[..., k]`.

    Raises:
        ValueError: shapes that do not fit; a `k` that is not a whole number between 1 and the number of classes.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> hidden, kernel = np.eye(1, dtype="float32"), np.log([[0.2, 0.5, 0.3]]).astype("float32")
    >>> ids, log_probs = kx.kernels.linear_top_k(hidden, kernel, 2)
    >>> [int(i) for i in ids[0]], [round(float(x), 4) for x in log_probs[0]]  # ln 0.5 and ln 0.3
    ([1, 2], [-0.6931, -1.204])
    """
    matrices = checked_matrices(hidden, kernel, bias, transpose_kernel, low_rank=low_rank)
    k = checked_k(k, matrices.num_classes)
    of_label = StatisticsRule.of(temperature, logit_softcap, everything=False)
    rule = TopKRule(of_label, arguments.positive("logit_softcap", logit_softcap), k)
    shape = ops.shape(matrices.hidden)[:-1]
    is_active = None
    if mask is not None:
        valid = align_weights(mask, matrices.hidden.shape[:-1], "mask")
        is_active = ops.reshape(ops.broadcast_to(valid, shape), (-1, 1))  # [N, 1]
    inputs = [None if one is None else ops.stop_gradient(one) for one in matrices.inputs(is_active)]
    static = static_options(rule, matrices, chunk_bytes)
    columns = _linear_loop.run(inputs, None, Data(is_active, ()), needs_grad=(False,) * len(inputs), **static).columns
    ids = ops.cast(columns[:, :k], "int32")
    if is_active is not None:
        ids = ops.where(is_active, ids, -1)
    return TopK(*(ops.reshape(one, (*shape, k)) for one in (ids, columns[:, k:])))


def checked_k(k: int, num_classes: int) -> int:
    """`k`, if there are so many classes."""
    k = arguments.count("k", k)
    if k > num_classes:
        raise ValueError(f"`k` must be at most the number of classes, {num_classes}. Received: k={k}.")
    if num_classes > MOST_CLASSES:
        raise ValueError(f"`kernel` must have at most {MOST_CLASSES} classes. Received: {num_classes}.")
    return k


def largest_of_rows(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest numbers of rows `[n, V]`, and their indices; of equal ones the first."""
    num_classes = logits.shape[1]
    num_blocks = num_classes // BLOCK
    if on_tpu() or num_blocks < MIN_BLOCKS * k:
        return _top_k(logits, k)
    # They are in the blocks that have the k largest maxima, of equal ones the first, or among the classes after the
    # last block. XLA:CPU takes maxima on all threads, and top_k on one; XLA:GPU sorts whole rows for top_k.
    num_in_blocks = num_blocks * BLOCK
    maxima = ops.max(ops.reshape(logits[:, :num_in_blocks], (-1, num_blocks, BLOCK)), axis=2)
    _, blocks = _top_k(opaque(maxima), k)
    first = ops.sort(blocks, axis=1) * BLOCK  # [n, k]
    ids = ops.reshape(first[:, :, None] + ops.arange(BLOCK, dtype="int32"), (-1, k * BLOCK))
    if num_in_blocks < num_classes:
        rest = ops.arange(num_in_blocks, num_classes, dtype="int32")
        ids = ops.concatenate([ids, ops.broadcast_to(rest, (ops.shape(ids)[0], num_classes % BLOCK))], axis=1)
    largest, places = _top_k(opaque(take_at_columns(logits, ids)), k)
    return largest, take_at_columns(ids, places)


def _top_k(array, k):
    # XLA:CPU (TensorFlow 2.21, JAX 0.10) takes a slice of the results, such as the first of each row, out of a sort of
    # all numbers: with [512, 32000] 6 s in place of 0.05.
    largest, indices = ops.top_k(array, k)
    return opaque(largest), opaque(ops.cast(indices, "int32"))


@dataclass(frozen=True)
class TopKRule(Rule):
    """Columns: the `k` likeliest classes, as floats, and their log-probabilities."""

    # The log-probability of a label, here the likeliest class.
    of_label: StatisticsRule
    softcap: float | None
    k: int

    num_values = 0
    num_rows = 0

    @property
    def num_columns(self) -> int:  # type: ignore[override]
        """The number of columns."""
        return 2 * self.k

    def forward(self, logits: Tensor, arrays: Any, constants: Any) -> tuple[tuple[Tensor, ...], Any]:
        """The columns, `[n, k]` each."""
        largest, ids = largest_of_rows(logits, self.k)  # [n, k]
        (log_prob,), _ = self.of_label.of_chunk(None, logits, (ids[:, :1],), constants)
        below = row.max_minus_logit(largest, largest[:, :1], self.softcap)
        return (ops.cast(ids, log_prob.dtype), log_prob - self.of_label.scale * below), None

    def row_scaled(self, upstream: Tensor, logits: Tensor, arrays: Any, constants: Any) -> ColumnsAndGradient | None:
        """The columns of a whole chunk."""
        return self.forward(logits, arrays, constants)[0], None

    def backward(self, upstream: Tensor, residuals: Any, logits: Tensor, arrays: Any, constants: Any) -> Tensor:
        """No column has a gradient."""
        raise NotImplementedError
