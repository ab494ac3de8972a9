"""Log-probabilities of tokens and sequences under a model, without its logits."""

from typing import Any

from keras import ops

from keras_xent import _words, arguments
from keras_xent._backend import no_autograph
from keras_xent._types import Tensor
from keras_xent._without_logits import call_without_logits
from keras_xent.kernels import sparse_softmax_cross_entropy
from keras_xent.kernels._masking import where_or_zero
from keras_xent.kernels.token_statistics import StatisticsRule, token_columns


@no_autograph
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
    axes = tuple(range(1, len(log_probs.shape)))
    total = ops.sum(log_probs, axis=axes)
    if not arguments.boolean("normalize", normalize):
        return total
    ones = ops.ones_like(log_probs)
    number = ops.sum(ones if valid is None else ops.cast(valid, ones.dtype), axis=axes)
    return ops.divide_no_nan(total, number)


def _log_probs_and_valid(model, x, labels, mask, temperature, training):
    temperature = arguments.above_zero("temperature", temperature)
    output = call_without_logits(model, x, training)
    if output.num_classes == 1:
        raise ValueError(
            "`model` must return a number for each class. Received: one unit, of a yes-or-no answer. Give a model with "
            "two units, or use the binary loss."
        )
    with _words.named(padding="leave it out with `mask`", one_hot=_words.GIVE_INDICES):
        labels, valid = output.aligned(labels, mask)
        if output.head is None:
            logits = output.logits if temperature == 1.0 else output.logits / temperature
            losses = sparse_softmax_cross_entropy(labels, logits, mask=valid)
            return where_or_zero(-losses, ops.not_equal(losses, 0)), valid
        (log_probs,) = token_columns(
            labels=labels,
            rule=StatisticsRule.of(temperature, output.head.logit_softcap, everything=False),
            mask=valid,
            gradients=output.head.gradients,
            **output.head.arguments(),
        )
        return log_probs, valid
