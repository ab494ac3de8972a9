"""Gradient accumulation that gives the step of the whole batch."""

from typing import Any

import keras

from keras_xent import _accumulation, _keras, arguments
from keras_xent._backend import accumulating_step
from keras_xent.losses import Distillation
from keras_xent.losses.base import Crossentropy

# Reductions of Keras' losses that are means over rows.
_MEANS = ("sum_over_batch_size", "mean", "auto")


def accumulate_gradients(model: Any, steps: int) -> Any:
    """Makes `fit` compute each batch in `steps` micro-batches, one after the other, and returns the model.

    For batches that are too large for the memory: it holds the activations of one micro-batch at a time. `batch_size`
    stays that of the whole batch, and so do steps, learning rate schedules, clipping and logs: the optimizer is called
    once a batch. Use it in place of the optimizer's `gradient_accumulation_steps`, which takes the mean of the
    micro-batches' means, so that tokens in short ones weigh more.

    Formula: `grad = sum_m grad sum_n t_n l_n / sum_n t_n w_n`, the inner sum over the valid tokens of micro-batch `m`
    and the denominator that of the whole batch, which is counted first, from labels, weights and mask. The same holds
    for every reduction of this package's losses but None, `normalizer`, and each of several outputs. Losses of Keras,
    and what your code makes of losses with reduction None, are taken for means over rows. A last batch of fewer rows is
    cut into fewer or smaller micro-batches. Under `tf.distribute` each replica cuts its own rows.

    What sees one micro-batch at a time, as in any accumulation: batch normalization and dropout's random numbers. A
    `train_step` of your own is used, if it computes its loss by `compute_loss` and calls `optimizer` once. Saving
    does not keep it: call this again after loading.

    Args:
        model: a Keras model, compiled or not.
        steps: how many micro-batches; 1 is a step as Keras makes it.

    Returns:
        The model.

    Raises:
        ValueError: `steps` that is no number of micro-batches. In `fit`: an optimizer with
            `gradient_accumulation_steps`; a loss of Keras whose reduction is no mean over rows.

    Warns once of a loss with reduction None, and of a loss of Keras for an output with a mask, or with `ignore_class`:
    its mean is over the valid elements of a micro-batch.

    Example:

    >>> import keras
    >>> import keras_xent as kx
    >>> model = keras.Sequential([keras.layers.Embedding(100, 8), kx.layers.LogitsDense(100)])
    >>> model.compile("adam", kx.losses.MaskedSequenceCrossentropy(ignore_class=0))
    >>> model = kx.accumulate_gradients(model, steps=4)  # model.fit(tokens, labels, batch_size=64): 4 times 16 rows

    References: `num_microbatches` of t5x; huggingface/transformers issue 34242, on what goes wrong without the count.
    """
    steps = arguments.count("steps", steps)
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a Keras model. Received: model={model!r}.")
    train_step = getattr(model.train_step, "accumulates", model.train_step)
    accumulated = accumulating_step(model, train_step, steps, _accumulation.counting, _accumulation.micro_batch)

    def checked_step(*arguments):
        _check(model)
        return accumulated(*arguments)

    checked_step.accumulates = train_step  # type: ignore[attr-defined]
    # Past the tracking of Keras, which takes what is set for a part of the model.
    object.__setattr__(model, "train_step", train_step if steps == 1 else checked_step)
    # What was traced before was one step.
    model.train_function = None
    return model


def _check(model: Any) -> None:
    own_steps = _accumulation.steps_of_optimizer(model.optimizer)
    if own_steps:
        raise ValueError(
            "The optimizer of a model with `accumulate_gradients` must not accumulate too. Received: an optimizer with "
            f"gradient_accumulation_steps={own_steps}. Leave it out."
        )
    foreign = [loss for loss in keras.tree.flatten(model.loss) if loss is not None and not _counts(loss)]
    for loss in foreign:
        reduction = getattr(loss, "reduction", "sum_over_batch_size")
        if reduction not in _MEANS:
            raise ValueError(
                f"A loss of Keras must have reduction='sum_over_batch_size' with `accumulate_gradients`. Received: "
                f"{loss} with reduction={reduction!r}. The losses of keras_xent are exact with any reduction."
            )
    outputs = getattr(model, "outputs", None) or []
    has_mask = any(_keras.mask_of(output) is not None for output in outputs)
    leaves_out = [loss for loss in foreign if has_mask or getattr(loss, "ignore_class", None) is not None]
    if leaves_out:
        arguments.warn(
            f"The loss {leaves_out[0]} takes the mean over the valid elements of each micro-batch, and not of the "
            "whole batch. Use a loss of keras_xent for outputs with a mask, and with `ignore_class`."
        )


def _counts(loss: Any) -> bool:
    """Returns whether a loss divides by the denominator of the whole batch."""
    return isinstance(loss, Crossentropy | Distillation)
