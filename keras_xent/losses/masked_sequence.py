"""Cross-entropy of sequences whose lengths differ."""

from typing import Any

import keras

from keras_xent import arguments
from keras_xent._types import DType, Reduction
from keras_xent.losses.sparse_categorical import SparseCategoricalCrossentropy


@keras.saving.register_keras_serializable(package="keras_xent")
class MaskedSequenceCrossentropy(SparseCategoricalCrossentropy):
    """Cross-entropy of the tokens of sequences, the mean over all valid tokens of the batch.

    For language models, translation and tagging. A token is valid if the Keras mask (for instance from
    `Embedding(mask_zero=True)`) and `ignore_class` both allow it. The exponential of this loss, without smoothing and
    class weights, is the perplexity.

    Formula, for valid tokens `n` with losses `l_n`, sample weights `t_n` and class weights `w_n` of their labels:

    - `reduction="token_mean"`: `sum_n t_n l_n / sum_n t_n w_n`, both sums over all replicas;
    - `reduction="sequence_mean"`: the mean over sequences of each one's token mean. Weights count within a sequence:
      one weight for a whole sequence cancels, and weight 0 leaves the sequence out;
    - `normalizer=K`: `sum_n t_n l_n / K`, for gradient accumulation, where no micro-batch knows the number of tokens of
      the whole batch.

    Without a valid token the loss is 0 and so is its gradient. Equivalent to (default reduction, no options):

        log_p = keras.ops.log_softmax(y_pred)
        nll = -keras.ops.take_along_axis(log_p, y_true[..., None], axis=-1)[..., 0]
        loss = keras.ops.sum(keras.ops.where(valid, nll, 0.0)) / keras.ops.sum(valid)

    Args:
        from_logits: whether `y_pred` holds logits (the default here) or probabilities.
        ignore_class: the label of padding, if labels mark it.
        label_smoothing: share in [0, 1] of the target spread evenly over all classes.
        class_weight: one weight per class: `[C]`, or a dict from class to weight. **Never use the `class_weight` of
            `fit` here**: Keras makes a wrong weight per sequence of it; the loss then warns.
        z_loss: weight of the squared log-sum-exp of the logits.
        logit_softcap: `c` of `c tanh(x / c)`, applied to the logits.
        normalizer: a number to divide by, in place of the sum of weights.
        reduction: `"token_mean"`, `"sequence_mean"`, `"sum"`, `"none"`, or those that divide by the number of valid
            tokens (`"sum_over_batch_size"`, `"mean"`) or the sum of their sample weights (`"mean_with_sample_weight"`).
        name: name of the loss.
        dtype: dtype of the result (default float32).

    Call arguments: `y_true` `[B, T]` integers, `y_pred` `[B, T, C]`, `sample_weight` a scalar, `[B]`, `[B, 1]` or
    `[B, T]`.

    Raises:
        ValueError: an argument out of its range; shapes that do not fit; in eager mode, a label out of range.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> loss = kx.losses.MaskedSequenceCrossentropy(ignore_class=-1)
    >>> logits = np.log([[[0.2, 0.7, 0.1], [0.2, 0.7, 0.1], [0.9, 0.05, 0.05]]])
    >>> round(float(loss(np.array([[1, 0, -1]]), logits)), 4)  # the mean of -ln 0.7 and -ln 0.2
    0.9831

    In a model, whose output layer lets the loss compute the logits in chunks:

    >>> import keras
    >>> model = keras.Sequential([keras.layers.Embedding(100, 8), kx.layers.LogitsDense(100)])
    >>> model.compile("adam", loss, metrics=[kx.metrics.Perplexity(ignore_class=-1)])

    References: the averages of t5x (`losses.py`, AVERAGE_PER_SEQUENCE) and of PyTorch's `cross_entropy`.
    """

    def __init__(
        self,
        *,
        from_logits: bool = True,
        ignore_class: int | None = None,
        label_smoothing: float = 0.0,
        class_weight: Any = None,
        z_loss: float = 0.0,
        logit_softcap: float | None = None,
        normalizer: float | None = None,
        reduction: Reduction | None = "token_mean",
        name: str | None = "masked_sequence_crossentropy",
        dtype: DType = None,
    ) -> None:
        super().__init__(
            from_logits=from_logits,
            ignore_class=ignore_class,
            reduction=reduction,
            name=name,
            dtype=dtype,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
            z_loss=z_loss,
            logit_softcap=logit_softcap,
        )
        if normalizer is not None and reduction in (None, "none"):
            raise ValueError(
                "`normalizer` must be None for losses that are not reduced. "
                f"Received: normalizer={normalizer!r} with reduction={reduction!r}."
            )
        self.normalizer = arguments.positive("normalizer", normalizer)
