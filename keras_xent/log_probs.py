"""Log-probabilities of tokens and sequences under a model, without its logits."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_xent import _words, arguments
from keras_xent._backend import no_autograph
from keras_xent._named_arguments import named_arguments
from keras_xent._types import Reduction, Tensor
from keras_xent._without_logits import as_inputs, output_of_classes
from keras_xent.kernels import linear_sequence_loss, sparse_softmax_cross_entropy
from keras_xent.kernels._dtypes import to_tensor
from keras_xent.kernels._masking import where_or_zero
from keras_xent.kernels._shapes import same_shape
from keras_xent.kernels.reduction import checked_reduction
from keras_xent.kernels.sequence_loss import checked_groups, reduced_losses
from keras_xent.kernels.token_statistics import StatisticsRule, token_columns
from keras_xent.provenance import is_training


@no_autograph
@named_arguments
def token_log_probs(
    model: Any,
    x: Any,
    labels: Tensor,
    *,
    mask: Tensor = None,
    temperature: float = 1.0,
    training: bool | None = None,
) -> Tensor:
    """The log-probability of each label under a language model: for preference tuning, policy optimization, scoring.

    Where the model ends in a `LogitsDense`, a `TiedLogits`, or a plain `Dense` or `ReversibleEmbedding` (every KerasHub
    `CausalLM`), the logits are not materialized, in eager calls either. Differentiable in the model's weights, in a
    `GradientTape`, in `train_step` and in `jax.grad` over `keras.StatelessScope`.

    Formula: `log softmax(logits / temperature)[label]`.

    Args:
        model: a Keras model with one output, logits `[B, T, V]` or a softmax of them.
        x: the inputs of the model.
        labels: integers `[B, T]`: what the model should predict at each position, the tokens that come next.
        mask: booleans `[B, T]`; False entries give 0. The Keras mask of the model's output counts too.
        temperature: divides the logits, after their soft cap.
        training: the `training` argument of the model's call.

    Returns:
        `[B, T]` (the shape of the labels), float32, never above 0.

    Raises:
        ValueError: shapes that do not fit; several outputs; in eager mode, a label out of range.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_xent as kx
    >>> model = keras.Sequential([keras.layers.Embedding(9, 4), keras.layers.Dense(9, kernel_initializer="zeros")])
    >>> log_probs = kx.token_log_probs(model, np.array([[1, 2]]), np.array([[2, 3]]))
    >>> [round(float(x), 4) for x in log_probs[0]]  # -ln 9
    [-2.1972, -2.1972]

    References: arXiv:2305.18290 (DPO), whose losses are functions of these.
    """
    return _log_probs_and_valid(model, x, labels, mask, temperature, training)[0]


@no_autograph
@named_arguments
def sequence_log_probs(
    model: Any,
    x: Any,
    labels: Tensor,
    *,
    mask: Tensor = None,
    temperature: float = 1.0,
    normalize: bool = False,
    training: bool | None = None,
) -> Tensor:
    """The log-probability of each sequence: what `keras_xent.preference` and rankings of completions need.

    Formula: the sum of `token_log_probs` over the valid tokens of a sequence; with `normalize` their mean, and 0 for a
    sequence without a valid token.

    Args:
        model: a Keras model with one output, logits `[B, T, V]` or a softmax of them.
        x: the inputs of the model.
        labels: integers `[B, T]`: what the model should predict at each position, the tokens that come next.
        mask: booleans `[B, T]`: which tokens belong to the completion. The Keras mask of the output counts too.
        temperature: divides the logits, after their soft cap.
        normalize: whether to divide by the number of valid tokens.
        training: the `training` argument of the model's call.

    Returns:
        `[B]`, float32.

    Raises:
        ValueError: shapes that do not fit; several outputs; in eager mode, a label out of range.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_xent as kx
    >>> model = keras.Sequential([keras.layers.Embedding(9, 4), keras.layers.Dense(9, kernel_initializer="zeros")])
    >>> round(float(kx.sequence_log_probs(model, np.array([[1, 2]]), np.array([[2, 3]]))[0]), 4)  # -2 ln 9
    -4.3944

    References: arXiv:2405.14734 (SimPO), on normalizing by length.
    """
    log_probs, valid = _log_probs_and_valid(model, x, labels, mask, temperature, training)
    return _of_sequences(log_probs, valid, normalize)


@no_autograph
@named_arguments
def sequence_loss(
    model: Any,
    x: Any,
    labels: Tensor,
    *,
    loss: Callable,
    arrays: tuple[Tensor, ...] = (),
    mask: Tensor = None,
    temperature: float = 1.0,
    normalize: bool = False,
    training: bool | None = None,
    reduction: Reduction | None = "mean",
    return_log_probs: bool = False,
) -> Any:
    """A loss of the log-probabilities of pairs or groups of sequences under a model: `kx.preference`, rankings.

    Where the logits are not materialized (see `token_log_probs`), the gradient is formed while the loss is computed, by
    `kernels.linear_sequence_loss`: the output layer takes three matmuls, where the log-probabilities alone take four.

    Equivalent to:

        log_probs = [kx.sequence_log_probs(model, x[:, i], labels[:, i], mask=mask[:, i], ...) for i in range(S)]
        losses = loss(*log_probs, *arrays)  # [G]

    Args:
        model: a Keras model with one output, logits `[B, T, V]` or a softmax of them. It is called once, on `G S` rows.
        x: the inputs of the model, `[G, S, ...]`: `G` groups of `S` sequences, such as the chosen and the rejected one.
        labels: integers `[G, S, T]`: what the model should predict at each position, the tokens that come next.
        loss: a function of `S` arrays `[G]`, the log-probabilities of the first sequences, the second ones and so on,
            and of `arrays`, that returns `[G]`. The loss of a group may depend on that group alone, and on nothing that
            changes but `arrays`. Each function is compiled anew, in eager mode also for each number of groups and
            tokens: define it once, outside of the step.
        arrays: what else the function takes, such as log-probabilities under a reference model. They have no gradient.
        mask: booleans `[G, S, T]`: which tokens belong to the completion. The Keras mask of the output counts too.
        temperature: divides the logits, after their soft cap.
        normalize: whether to divide log-probabilities by the number of valid tokens of a sequence; 0 where none is.
        training: the `training` argument of the model's call. With False no gradient is formed on the way.
        reduction: `"none"`, or one of the reductions of the losses, of which `"sum"` alone is not a mean over groups.
        return_log_probs: whether to return `(loss, log_probs)`, with log-probabilities `[G, S]` without gradient.

    Returns:
        The reduced loss, or losses `[G]`, float32.

    Raises:
        ValueError: shapes that do not fit; several outputs; in eager mode, a label out of range.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_xent as kx
    >>> model = keras.Sequential([keras.layers.Embedding(9, 4), keras.layers.Dense(9, kernel_initializer="zeros")])
    >>> x, labels = np.array([[[1, 2], [1, 2]]]), np.array([[[2, 3], [2, 4]]])
    >>> round(float(kx.sequence_loss(model, x, labels, loss=kx.preference.simpo)), 4)  # -ln sigmoid(-0.5)
    0.9741

    References: arXiv:2410.10989 (Liger Kernel), on forming the gradient in the forward pass.
    """
    temperature = arguments.above_zero("temperature", temperature)
    reduction = checked_reduction(reduction)
    labels = checked_groups(to_tensor(labels, "labels"))
    shape = ops.shape(labels)
    x = keras.tree.map_structure(lambda one: _rows("x", one, labels), as_inputs(x))
    output = output_of_classes(model, x, training)
    rows, mask = _rows("labels", labels, labels), None if mask is None else _rows("mask", to_tensor(mask), labels)
    if output.head is None:
        of_tokens, valid = _of_output(output, rows, mask, temperature)
        log_probs = ops.reshape(_of_sequences(of_tokens, valid, normalize), shape[:2])
        result = reduced_losses(loss, log_probs, arrays, reduction)
        return (result, ops.stop_gradient(log_probs)) if return_log_probs else result
    with _named():
        _, valid = output.aligned(rows, mask)
        head = output.head._replace(hidden=ops.reshape(output.head.hidden, (*shape, output.head.hidden.shape[-1])))
        return linear_sequence_loss(
            labels=labels,
            loss=loss,
            arrays=arrays,
            normalize=normalize,
            temperature=temperature,
            mask=None if valid is None else ops.reshape(valid, shape),
            logit_softcap=head.logit_softcap,
            reduction=reduction,
            training=training is None or is_training(training),
            gradients=head.gradients,
            return_log_probs=return_log_probs,
            **head.arguments(),
        )


def _rows(name, array, labels):
    """The array `[G, S, ...]` as `[G S, ...]`."""
    given = getattr(array, "shape", ())
    if not same_shape(given[:2], labels.shape[:2]):
        raise ValueError(
            f"`{name}` must have shape [G, S, ...], with groups and sequences as in `labels`. Received: shape "
            f"{tuple(given)} and labels of shape {tuple(labels.shape)}."
        )
    first, second, *rest = ops.shape(array)
    return ops.reshape(array, (first * second, *rest))


def _of_sequences(log_probs, valid, normalize):
    axes = tuple(range(1, len(log_probs.shape)))
    total = ops.sum(log_probs, axis=axes)
    if not arguments.boolean("normalize", normalize):
        return total
    ones = ops.ones_like(log_probs)
    number = ops.sum(ones if valid is None else ops.cast(valid, ones.dtype), axis=axes)
    return ops.divide_no_nan(total, number)


def _log_probs_and_valid(model, x, labels, mask, temperature, training):
    temperature = arguments.above_zero("temperature", temperature)
    return _of_output(output_of_classes(model, x, training), labels, mask, temperature)


def _named():
    return _words.named(padding="leave it out with `mask`", one_hot=_words.GIVE_INDICES)


def _of_output(output, labels, mask, temperature):
    """The log-probabilities of tokens, and which of them are valid; None: all."""
    with _named():
        labels, valid = output.aligned(labels, mask)
        if output.head is None:
            losses = sparse_softmax_cross_entropy(labels, output.logits_at(temperature), mask=valid)
            return where_or_zero(-losses, ops.not_equal(losses, 0)), valid
        head = output.head
        rule = StatisticsRule.of(temperature, head.logit_softcap, everything=False)
        (log_probs,) = token_columns(
            rule, head.matrices(), labels, valid, gradients=head.gradients, chunk_bytes=head.chunk_bytes
        )
        return log_probs, valid
