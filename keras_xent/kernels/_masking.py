"""Selecting instead of multiplying: 0 times NaN or infinity is NaN, and what is masked may hold either."""

from keras import ops

from keras_xent._types import Tensor


def where_or_zero(value: Tensor, condition: Tensor) -> Tensor:
    """`value` where the condition is True, 0 elsewhere even if the value is NaN; all of it if the condition is None."""
    if condition is None:
        return value
    # One zero: zeros of a known shape are a constant to TensorFlow, which takes memory inside `jit_compile=True`.
    return ops.where(condition, value, ops.zeros((), value.dtype))


def multiply_no_nan(weight: Tensor, value: Tensor) -> Tensor:
    """`weight * value`, where 0 times an infinite value is 0."""
    return where_or_zero(weight * value, ops.not_equal(weight, 0.0))
