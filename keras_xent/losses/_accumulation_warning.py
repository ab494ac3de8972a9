"""A warning where the optimizer accumulates gradients of losses that are means over unequal numbers of labels."""

import inspect
from typing import Any

from keras_xent import _accumulation, _keras
from keras_xent._types import Tensor

# Means whose denominator is the number of valid labels, and those in which it is the sum of their weights.
_COUNTS, _SUMS_OF_WEIGHTS = ("sum_over_batch_size", "mean"), ("mean_with_sample_weight", "token_mean")


def warn_of_accumulation(loss: Any, y_pred: Tensor, sample_weight: Tensor) -> None:
    """Says once that the optimizer's mean of the micro-batches' means is not the mean over the whole batch.

    Nothing is said where every micro-batch of as many rows has the same denominator.
    """
    if "accumulation" in loss._warned or not _may_differ(loss, y_pred, sample_weight):
        return
    if not _accumulation.steps_of_optimizer(getattr(_keras.model_of_step(), "optimizer", None)):
        return
    or_normalizer = (
        ", or give the loss `normalizer`" if "normalizer" in inspect.signature(type(loss)).parameters else ""
    )
    what, weighs = "the valid labels", "tokens of short micro-batches weigh"
    if loss.reduction == "sequence_mean":
        what, weighs = "the sequences with a valid label", "if some have none, the others of their micro-batch weigh"
    loss._warn_once(
        "accumulation",
        f"{type(loss).__name__} is a mean over {what} of each micro-batch, and the optimizer's "
        f"`gradient_accumulation_steps` takes the mean of these means: {weighs} more. Use "
        f"keras_xent.accumulate_gradients(model, steps) on whole batches{or_normalizer}.",
    )


def _may_differ(loss, y_pred, sample_weight):
    """Returns whether micro-batches of as many rows may have different denominators."""
    if loss.reduction not in (*_COUNTS, *_SUMS_OF_WEIGHTS, "sequence_mean"):
        return False
    if getattr(loss, "normalizer", None) is not None:
        return False
    if getattr(loss, "ignore_class", None) is not None or _keras.mask_of(y_pred) is not None:
        return True
    # One weight for all is a factor of each micro-batch's loss, and those of one sequence are a factor of its mean.
    has_weights = len(getattr(sample_weight, "shape", None) or ()) > 0
    has_class_weights = loss.reduction == "token_mean" and getattr(loss, "class_weight", None) is not None
    return (loss.reduction in _SUMS_OF_WEIGHTS and has_weights) or has_class_weights
