"""The likeliest classes of each token under a model, without its logits."""

from typing import Any

from keras import ops

from keras_xent import arguments
from keras_xent._backend import no_autograph
from keras_xent._named_arguments import named_arguments
from keras_xent._types import Tensor
from keras_xent._without_logits import output_of_classes
from keras_xent.kernels import TopK, linear_top_k, sparse_softmax_cross_entropy
from keras_xent.kernels._dtypes import upcast
from keras_xent.kernels._softmax_row import max_minus_logit
from keras_xent.kernels.top_k import checked_k, largest_of_rows


@no_autograph
@named_arguments
def top_k_log_probs(
    model: Any,
    x: Any,
    k: int,
    *,
    mask: Tensor = None,
    temperature: float = 1.0,
    training: bool | None = None,
) -> TopK:
    """The `k` likeliest next tokens at each position under a language model, and their log-probabilities.

    To store a teacher for `kernels.linear_top_k_distillation`, and to look at what a model predicts. Where the model
    ends in a `LogitsDense`, a `TiedLogits`, or a plain `Dense` or `ReversibleEmbedding` (every KerasHub `CausalLM`),
    the logits are not materialized, in eager calls either. Without a gradient.

    Equivalent to:

        log_probs, ids = ops.top_k(ops.log_softmax(model(x) / temperature), k)

    Args:
        model: a Keras model with one output, logits `[B, T, V]` or a softmax of them.
        x: the inputs of the model.
        k: how many classes.
        mask: booleans `[B, T]`; where False, `ids` are -1 and `log_probs` 0. The Keras mask of the output counts too.
        temperature: divides the logits, after their soft cap.
        training: the `training` argument of the model's call.

    Returns:
        `TopK(ids, log_probs)`: int32 and float32 `[B, T, k]`, the likeliest class first.

    Raises:
        ValueError: shapes that do not fit; several outputs; a `k` that is not a whole number between 1 and the number
            of classes.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_xent as kx
    >>> model = keras.Sequential([keras.layers.Embedding(9, 4), keras.layers.Dense(9, kernel_initializer="zeros")])
    >>> model.build((None, None))
    >>> _ = model.layers[-1].bias.assign(np.log(np.arange(9) + 1.0))
    >>> ids, log_probs = kx.top_k_log_probs(model, np.array([[1, 2]]), 2)
    >>> [int(i) for i in ids[0, 0]], [round(float(p), 4) for p in log_probs[0, 0]]  # ln(9 / 45), ln(8 / 45)
    ([8, 7], [-1.6094, -1.7272])
    """
    temperature = arguments.above_zero("temperature", temperature)
    output = output_of_classes(model, x, training)
    valid = output.valid(mask)
    if output.head is not None:
        head = output.head
        return linear_top_k(
            k=k, temperature=temperature, mask=valid, logit_softcap=head.logit_softcap, **head.arguments()
        )
    k, shape = checked_k(k, output.num_classes), ops.shape(output.logits)[:-1]
    largest, ids = largest_of_rows(ops.reshape(output.logits, (-1, output.num_classes)), k)  # [N, k]
    largest, ids = (ops.reshape(one, (*shape, k)) for one in (upcast(largest), ids))
    first = sparse_softmax_cross_entropy(ids[..., 0], output.logits_at(temperature))
    below = max_minus_logit(largest, largest[..., :1], None) / temperature
    log_probs = -ops.stop_gradient(first[..., None] + below)
    if valid is None:
        return TopK(ids, log_probs)
    valid = valid[..., None]
    return TopK(ops.where(valid, ids, -1), ops.where(valid, log_probs, 0.0))
