"""Logits from probabilities, for models that end in a softmax or sigmoid whose logits are not known."""

import keras
from keras import ops

from keras_xent._backend import custom_gradient
from keras_xent._types import Tensor
from keras_xent.kernels._dtypes import dtype_of, upcast
from keras_xent.kernels._masking import where_or_zero

# How far rounding may move a probability out of [0, 1].
ROUNDING = 1e-3


def log_probabilities(probabilities: Tensor) -> Tensor:
    """`log p`, which serve as logits of a softmax. Like Keras, no probability is below `keras.config.epsilon()`.

    The gradient is `1 / p` of the clipped probability even where it was clipped: a model that is wrong with certainty
    still learns, where Keras' gradient is 0. Numbers below 0 are no probabilities, and get no gradient.
    """
    return _log(probabilities, smallest=keras.config.epsilon())


def log_odds(probabilities: Tensor) -> Tensor:
    """`log p - log (1 - p)`, which serve as logits of a sigmoid; clipped to epsilon and `1 - epsilon` as in Keras.

    The gradient is that of the clipped probability, as for `log_probabilities`; none for numbers outside [0, 1].
    """
    return _odds(probabilities, smallest=keras.config.epsilon())


def _log_forward(probabilities, *, smallest):
    return ops.log(ops.maximum(upcast(probabilities), smallest)), ()


def _log_backward(upstream, residuals, probabilities, *, smallest):
    p = upcast(probabilities)
    return _divide(upstream, ops.maximum(p, smallest), p, p < 0, probabilities)


def _odds_forward(probabilities, *, smallest):
    p = ops.clip(upcast(probabilities), smallest, 1.0 - smallest)
    return ops.log(p) - ops.log1p(-p), ()


def _odds_backward(upstream, residuals, probabilities, *, smallest):
    p = upcast(probabilities)
    clipped = ops.clip(p, smallest, 1.0 - smallest)
    outside = ops.logical_or(p < 0, p > 1 + ROUNDING)
    return _divide(upstream, clipped * (1.0 - clipped), p, outside, probabilities)


def _divide(upstream, divisor, p, outside, probabilities):
    # NaN whose upstream gradient is 0 leaves no trace. It is removed from the divisor too, for the derivative of this
    # gradient.
    no_gradient = ops.logical_or(outside, ops.logical_and(ops.equal(upstream, 0.0), ops.isnan(p)))
    gradient = upstream / ops.where(no_gradient, ops.ones((), divisor.dtype), divisor)
    gradient = where_or_zero(gradient, ops.logical_not(no_gradient))
    # 1 / epsilon is past the largest float16, which takes its place.
    if dtype_of(probabilities) == "float16":
        gradient = ops.clip(gradient, -65504.0, 65504.0)
    return ops.cast(gradient, probabilities.dtype)


_log = custom_gradient(_log_forward, _log_backward)
_odds = custom_gradient(_odds_forward, _odds_backward)
