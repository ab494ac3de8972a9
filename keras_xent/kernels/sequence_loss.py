"""Losses of groups of sequences, such as pairs, whose gradient is formed while log-probabilities are computed.

The gradient for the logits of a token is that of its log-probability, times the derivative of the loss for the sum over
its sequence. That derivative is known once all tokens of its group are: so a chunk holds whole groups.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from keras import ops

from keras_xent import _backend, arguments
from keras_xent._backend import fused_gradient, no_autograph, on_any_mesh, uses_xla_cpu
from keras_xent._named_arguments import named_arguments
from keras_xent._types import Reduction, Tensor
from keras_xent.kernels import _exponentials, _linear_loop, _linear_pass
from keras_xent.kernels import reduction as _reduction
from keras_xent.kernels._dtypes import accumulator_dtype, dtype_of, is_float, to_tensor
from keras_xent.kernels._linear_loop import Data
from keras_xent.kernels._linear_pass import GRADIENTS, checked_matrices
from keras_xent.kernels._masking import multiply_no_nan, where_or_zero
from keras_xent.kernels._rule import ColumnsAndGradient, Rule
from keras_xent.kernels._shapes import same_shape
from keras_xent.kernels._token_chunks import holds_groups
from keras_xent.kernels.linear import checked_labels
from keras_xent.kernels.token_statistics import StatisticsRule, indices_of, log_prob_of


@no_autograph
@named_arguments
@on_any_mesh
def linear_sequence_loss(
    hidden: Tensor,
    kernel: Tensor,
    labels: Tensor,
    bias: Tensor = None,
    *,
    loss: Callable,
    arrays: tuple[Tensor, ...] = (),
    normalize: bool = False,
    temperature: float = 1.0,
    transpose_kernel: bool = False,
    mask: Tensor = None,
    ignore_class: int | None = None,
    logit_softcap: float | None = None,
    reduction: Reduction | None = "mean",
    training: bool = True,
    gradients: tuple[str, ...] = GRADIENTS,
    low_rank: tuple[Tensor, Tensor] | None = None,
    chunk_bytes: int | None = None,
    return_log_probs: bool = False,
) -> Any:
    """A loss of the log-probabilities of pairs or groups of sequences, without the logits: `kx.preference`, rankings.

    The gradient is formed while the loss is computed, with three matmuls in all, where `linear_token_statistics` takes
    four. A chunk of logits then holds a whole group, or with a mask two (masked tokens cost nothing): more than 64 MB
    on a CPU, or 512 MB on an accelerator, only up to an eighth of all logits. Otherwise, and for a soft cap on a CPU, a
    length `T` that is not known, groups that devices share, and `reduction="none"`, four matmuls give the same.

    Equivalent to:

        log_probs = kx.kernels.linear_token_statistics(hidden, kernel, labels, bias, ...).log_prob  # [G, S, T]
        sums = keras.ops.unstack(keras.ops.sum(log_probs, axis=2), axis=1)
        losses = loss(*sums, *arrays)

    Args:
        hidden: hidden states `[G, S, T, D]`: `G` groups of `S` sequences, such as the chosen and the rejected one.
        kernel: `[D, V]`, or `[V, D]` with `transpose_kernel`.
        labels: integers `[G, S, T]`.
        bias: `[V]`, or None.
        loss: a function of `S` arrays `[G]`, the log-probabilities of the first sequences, the second ones and so on,
            and of `arrays`, that returns `[G]`. The loss of a group may depend on that group alone, and on nothing that
            changes but `arrays`. Each function is compiled anew, in eager mode also for each number of groups and
            tokens: define it once, outside of the step.
        arrays: what else the function takes, such as log-probabilities under a reference model. They have no gradient.
        normalize: whether to divide log-probabilities by the number of valid tokens of a sequence; 0 where none is.
        temperature: divides the logits, after the soft cap.
        transpose_kernel: whether the kernel is `[V, D]`.
        mask: booleans of the shape of `labels`, `[G, S]` or `[G]`; False is not valid.
        ignore_class: the label of tokens that are not valid.
        logit_softcap: `c` of `c tanh(x / c)`.
        reduction: `"none"`, or one of the reductions of the losses, of which `"sum"` alone is not a mean over groups.
        training: whether a gradient will be requested. Read on TensorFlow only; a wrong value costs time and changes no
            result.
        gradients: which of the inputs need a gradient: names among `hidden`, `kernel`, `bias` and `low_rank`. Read on
            TensorFlow only.
        low_rank: two factors whose product is added to the kernel, as in `linear_cross_entropy`.
        chunk_bytes: the most memory that a chunk of logits may take; None: chosen.
        return_log_probs: whether to return `(loss, log_probs)`, with log-probabilities `[G, S]` without gradient.

    Returns:
        The reduced loss, or losses `[G]`, float32 (float64 for float64 hidden states).

    Raises:
        ValueError: shapes that do not fit; in eager mode, a label out of range.
        InvalidArgumentError: the latter in a TensorFlow graph on the CPU.
        NotImplementedError: a second derivative on TensorFlow.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> hidden, kernel = np.ones((1, 2, 1, 1), "float32"), np.log([[0.2, 0.8]]).astype("float32")
    >>> loss = kx.kernels.linear_sequence_loss(hidden, kernel, np.array([[[1], [0]]]), loss=kx.preference.orpo)
    >>> round(float(loss), 4)  # -ln 0.8 - 0.1 ln sigmoid(ln 16)
    0.2292

    References: gradients of preference losses formed in the forward pass, arXiv:2410.10989 (Liger Kernel).
    """
    matrices = checked_matrices(hidden, kernel, bias, transpose_kernel, low_rank=low_rank)
    labels = checked_groups(checked_labels(labels, matrices.hidden))
    reduction = _reduction.checked_reduction(reduction)
    indices, is_active = indices_of(labels, matrices.num_classes, mask, ignore_class)  # [N, 1]
    shape, dtype = ops.shape(labels), accumulator_dtype(matrices.hidden)
    numbers = ops.ones(shape[:2], dtype)  # [G, S]
    if arguments.boolean("normalize", normalize):
        ones = ops.ones_like(labels) if is_active is None else ops.reshape(is_active, shape)
        numbers = ops.sum(ops.cast(ones, dtype), axis=2)
    of_tokens = StatisticsRule.of(temperature, logit_softcap, everything=False)
    rule = SequenceRule(of_tokens, loss)
    inputs, constants = matrices.inputs(is_active), (numbers, *checked_arrays(arrays, dtype))
    check_loss(loss, labels.shape[1], constants[1:])
    if _forms_gradient(matrices, inputs, labels.shape, is_active, of_tokens.softcap, reduction, chunk_bytes):
        _, count, length = shape
        sequence = ops.repeat(ops.arange(shape[0] * count, dtype="int32"), length)[:, None]  # [N, 1]
        static = _linear_pass.static_options(rule, matrices, chunk_bytes)
        flat = _linear_pass.flat(Data(is_active, (indices, sequence), constants))
        needs_grad = _linear_pass.needed(gradients)
        total, (log_probs,) = _total(inputs, flat, needs_grad, bool(training), group=count * length, **static)
        _, denominator = _reduction.reduction_weights(ops.zeros(shape[:1], dtype), reduction=reduction)
        result = _reduction.mean(total, denominator, reduction)
    else:
        data = Data(is_active, (indices,))
        found, _ = _linear_pass.values(of_tokens, matrices, data, gradients=gradients, chunk_bytes=chunk_bytes)
        log_probs = rule.sums(ops.reshape(found, shape), numbers)
        result = reduced_losses(loss, log_probs, constants[1:], reduction)
    return (result, ops.stop_gradient(log_probs)) if return_log_probs else result


def checked_groups(labels: Tensor) -> Tensor:
    """The labels; a ValueError where their shape is not `[G, S, T]`."""
    if len(labels.shape) != 3 or labels.shape[1] is None:
        raise ValueError(
            "`labels` must have shape [G, S, T], with a known S: groups, sequences of a group, tokens of a sequence. "
            f"Received: labels of shape {tuple(labels.shape)}."
        )
    return labels


def checked_arrays(arrays: Any, dtype: str) -> tuple[Tensor, ...]:
    """The arrays as tensors, floats in the dtype of log-probabilities; a ValueError where there is no tuple of them."""
    if not isinstance(arrays, (tuple, list)):
        raise ValueError(
            "`arrays` must be a tuple, with an array for each argument of `loss` after the log-probabilities. "
            f"Received: {type(arrays).__name__}. Of a single array make `(array,)`."
        )
    # Those of a reference model come from NumPy, in float64 as likely as not.
    tensors = [to_tensor(one, "arrays") for one in arrays]
    return tuple(ops.cast(one, dtype) if is_float(one) else one for one in tensors)


def check_loss(loss: Any, num_sequences: int, arrays: Any) -> None:
    """Raises a ValueError where `loss` is no function of the log-probabilities and arrays."""
    if not callable(loss):
        raise ValueError(
            "`loss` must be a function of log-probabilities and of `arrays`, such as `keras_xent.preference.dpo`. "
            f"Received: loss={loss!r}."
        )
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):
        # Some functions of C have none.
        return
    try:
        signature.bind(*range(num_sequences), *arrays)
    except TypeError as error:
        raise ValueError(
            f"`loss` must take the log-probabilities of each of the {num_sequences} sequences of a group (axis 1 of "
            f"`labels`), and then each of `arrays`. Received: {num_sequences} sequences and {len(arrays)} arrays for "
            f"`{getattr(loss, '__name__', type(loss).__name__)}`, {error}."
        ) from None


def losses_of(loss: Callable, log_probs: Tensor, arrays: Iterable[Tensor]) -> Tensor:
    """The losses `[G]` of log-probabilities `[G, S]`."""
    losses = loss(*(log_probs[:, i] for i in range(log_probs.shape[1])), *arrays)
    shape = getattr(losses, "shape", None)
    if shape is None or not same_shape(shape, log_probs.shape[:1]):
        received = type(losses).__name__ if shape is None else f"a result of shape {tuple(shape)}"
        raise ValueError(
            "`loss` must return one number for each group, [G]; `reduction` makes one of them. "
            f"Received: {received} of log-probabilities of shape {tuple(log_probs.shape)}."
        )
    return losses


def reduced_losses(loss: Callable, log_probs: Tensor, arrays: Iterable[Tensor], reduction: Reduction | None) -> Tensor:
    """The reduced loss of log-probabilities `[G, S]`, differentiable in them."""
    arrays = tuple(map(ops.stop_gradient, checked_arrays(arrays, dtype_of(log_probs))))
    check_loss(loss, log_probs.shape[1], arrays)
    return _reduction.reduce(losses_of(loss, log_probs, arrays), reduction=reduction)


def _forms_gradient(matrices, inputs, shape, is_active, softcap, reduction, chunk_bytes):
    """Whether a chunk can hold whole groups, and the gradient be formed in the forward pass."""
    groups, count, length = shape
    if reduction in (None, "none") or length is None or 0 in shape:
        return False
    if softcap is not None and uses_xla_cpu():
        # Of blocks of rows, which are smaller than chunks.
        return False
    if _backend.batch_mesh(inputs[0]) is not None and _backend.batch_mesh(matrices.hidden) is None:
        return False
    return holds_groups(
        groups,
        count * length,
        matrices.num_classes,
        is_masked=is_active is not None,
        features=matrices.hidden.shape[-1],
        chunk_bytes=chunk_bytes,
    )


@dataclass(frozen=True)
class SequenceRule(Rule):
    """One column, the log-probability; the gradient is that of the sum of the losses of all groups.

    Arrays are labels and numbers of sequences, constants what the log-probabilities `[G, S]` are divided by, and what
    the loss takes beside them. `upstream` is 1 for the tokens of groups that the chunk holds, 0 elsewhere.
    """

    of_tokens: StatisticsRule
    loss: Callable
    num_columns = 1
    num_rows = 2

    def forward(self, logits: Tensor, arrays: Any, constants: Any) -> tuple[tuple[Tensor, ...], Any]:
        """The column, and residuals."""
        columns, residuals = self.of_tokens.forward(logits, arrays[:1], ())
        return columns, (residuals, columns[0])

    def backward(self, upstream: Tensor, residuals: Any, logits: Tensor, arrays: Any, constants: Any) -> Tensor:
        """The gradient for the logits."""
        labels, sequence = arrays
        residuals, log_prob = residuals
        upstream = self._slopes(upstream, log_prob, sequence, *constants)
        return self.of_tokens.backward(upstream, residuals, logits, (labels,), ())

    def row_scaled(self, upstream: Tensor, logits: Tensor, arrays: Any, constants: Any) -> ColumnsAndGradient | None:
        """The same from exponentials in the memory of the logits."""
        if self.of_tokens.softcap is not None:
            return None
        labels, sequence = arrays
        found = _exponentials.of_labels(logits, labels, scale=self.of_tokens.scale)
        log_prob = log_prob_of(found.nll)
        if upstream is not None:
            upstream = -self.of_tokens.scale * self._slopes(upstream, log_prob, sequence, *constants)
        return (log_prob,), found.gradient(labels, upstream)

    def sums(self, log_probs: Tensor, numbers: Tensor) -> Tensor:
        """The log-probabilities `[G, S]` of sequences, from those of tokens `[G, S, T]`."""
        return ops.divide_no_nan(ops.sum(log_probs, axis=2), numbers)

    def _slopes(self, upstream, log_prob, sequence, numbers, *arrays):
        """The derivatives of the losses for the log-probabilities of tokens `[n, 1]`, 0 where `upstream` is."""
        used = where_or_zero(log_prob, ops.not_equal(upstream, 0))
        sums = ops.segment_sum(used[:, 0], sequence[:, 0], num_segments=ops.size(numbers))

        # Of all groups, those elsewhere included: they are few numbers.
        def losses(sums):
            return losses_of(self.loss, ops.divide_no_nan(sums, numbers), arrays)

        slopes = _backend.gradient_of_sum(losses, ops.reshape(sums, ops.shape(numbers)))
        return multiply_no_nan(upstream, ops.take(ops.reshape(slopes, (-1, 1)), sequence[:, 0], axis=0))


def _forward(inputs, nondiff_args, needs_grad, *, rule, group, **static):
    data = _linear_pass.data_of(nondiff_args, rule)
    numbers, *arrays = data.constants
    upstream = None
    if any(needs_grad):
        upstream = ops.ones((ops.shape(inputs[0])[0], 1), numbers.dtype)
        static = {**static, "group": group}
    columns, gradients = _linear_loop.run(inputs, upstream, data, needs_grad=needs_grad, rule=rule, **static)
    log_probs = rule.sums(ops.reshape(columns, (*ops.shape(numbers), -1)), numbers)
    return _reduction.total(losses_of(rule.loss, log_probs, arrays)), (log_probs,), gradients


def _backward(upstream, residuals, inputs, nondiff_args, needs_grad, **static):
    if _linear_pass.is_missing(residuals, inputs, needs_grad):
        _, _, residuals = _forward(inputs, nondiff_args, needs_grad, **static)
    return _linear_pass.scaled(upstream, residuals, inputs)


_total = fused_gradient(_forward, _backward)
