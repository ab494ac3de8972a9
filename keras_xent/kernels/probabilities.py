"""Logits from probabilities, for models that end in a softmax or sigmoid whose logits are not known."""

import keras
from keras import ops

from keras_xent._backend import custom_gradient
from keras_xent._types import Tensor
from keras_xent.kernels._dtypes import dtype_of, is_float, smallest_normal, upcast
from keras_xent.kernels._masking import where_or_zero

# How far rounding may move a probability out of [0, 1].
ROUNDING = 1e-3


def log_probabilities(probabilities: Tensor, *, is_clipped: bool = True, is_loss_scaled: bool | None = None) -> Tensor:
    """`log p`, which serve as logits of a softmax. Like Keras, no probability is below `keras.config.epsilon()`.

    Of a hundred thousand classes of probability 0 that adds up to 0.01: without `is_clipped` none is below the smallest
    normal number.

    The gradient is `1 / p` of the clipped probability even where it was clipped: a model that is wrong with certainty
    still learns, where Keras' gradient is 0. Numbers below 0 are no probabilities, and get no gradient.

    `1 / epsilon` is past the largest float16. Where a loss scale watches for infinity, it gets that; elsewhere the
    largest float16 takes its place. `is_loss_scaled` None: an upstream gradient above 1 is taken for a scaled one.
    """
    smallest = keras.config.epsilon() if is_clipped else smallest_normal(upcast(probabilities))
    return _log(probabilities, smallest=smallest, is_loss_scaled=is_loss_scaled)


def log_odds(probabilities: Tensor, *, is_loss_scaled: bool | None = None) -> Tensor:
    """`log p - log (1 - p)`, which serve as logits of a sigmoid; clipped to epsilon and `1 - epsilon` as in Keras.

    The gradient is that of the clipped probability, as for `log_probabilities`; none for numbers outside [0, 1].
    """
    return _odds(probabilities, smallest=keras.config.epsilon(), is_loss_scaled=is_loss_scaled)


def are_distributions(predictions: Tensor, axis: int = -1) -> bool:
    """Whether the numbers of an eager array are probabilities of classes: none below 0, and of each row the sum 1.

    Logits would hardly be.
    """
    if not is_float(predictions) or 0 in predictions.shape or predictions.shape[axis] == 1:
        return False
    p = ops.cast(predictions, "float32")
    off = ops.max(ops.abs(ops.sum(p, axis=axis) - 1.0))
    return bool(ops.logical_and(ops.min(p) >= 0, off < ROUNDING))


def _log_forward(probabilities, *, smallest, is_loss_scaled):
    return ops.log(ops.maximum(upcast(probabilities), smallest)), ()


def _log_backward(upstream, residuals, probabilities, *, smallest, is_loss_scaled):
    p = upcast(probabilities)
    return _divide(upstream, ops.maximum(p, smallest), p, p < 0, probabilities, is_loss_scaled)


def _odds_forward(probabilities, *, smallest, is_loss_scaled):
    p = ops.clip(upcast(probabilities), smallest, 1.0 - smallest)
    return ops.log(p) - ops.log1p(-p), ()


def _odds_backward(upstream, residuals, probabilities, *, smallest, is_loss_scaled):
    p = upcast(probabilities)
    clipped = ops.clip(p, smallest, 1.0 - smallest)
    outside = ops.logical_or(p < 0, p > 1 + ROUNDING)
    return _divide(upstream, clipped * (1.0 - clipped), p, outside, probabilities, is_loss_scaled)


def _divide(upstream, divisor, p, outside, probabilities, is_loss_scaled):
    # NaN whose upstream gradient is 0 leaves no trace. It is removed from the divisor too, for the derivative of this
    # gradient.
    no_gradient = ops.logical_or(outside, ops.logical_and(ops.equal(upstream, 0.0), ops.isnan(p)))
    gradient = upstream / ops.where(no_gradient, ops.ones((), divisor.dtype), divisor)
    gradient = where_or_zero(gradient, ops.logical_not(no_gradient))
    if dtype_of(probabilities) == "float16" and not is_loss_scaled:
        clipped = ops.clip(gradient, -65504.0, 65504.0)
        gradient = clipped if is_loss_scaled is False else ops.where(ops.abs(upstream) > 1.0, gradient, clipped)
    return ops.cast(gradient, probabilities.dtype)


_log = custom_gradient(_log_forward, _log_backward)
_odds = custom_gradient(_odds_forward, _odds_backward)
