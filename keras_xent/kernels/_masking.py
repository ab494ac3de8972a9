"""Selecting instead of multiplying: 0 times NaN or infinity is NaN, and what is masked may hold either."""

from keras import ops

from keras_xent._backend import uses_xla
from keras_xent._types import Tensor


def where_or_zero(value: Tensor, condition: Tensor) -> Tensor:
    """`value` where the condition is True, 0 elsewhere even if the value is NaN; all of it if the condition is None."""
    if condition is None:
        return value
    # One zero: zeros of a known shape are a constant to TensorFlow, which takes memory inside `jit_compile=True`.
    return ops.where(condition, value, ops.zeros((), value.dtype))


def both(first: Tensor, second: Tensor) -> Tensor:
    """True where both are; None stands for True everywhere."""
    if first is None or second is None:
        return second if first is None else first
    return ops.logical_and(first, second)


def multiply_no_nan(weight: Tensor, value: Tensor) -> Tensor:
    """`weight * value`, where 0 times an infinite value is 0."""
    return where_or_zero(weight * value, ops.not_equal(weight, 0.0))


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """`weights * values`, where values of weight 0 count neither here nor in a gradient, whatever they are."""
    return where_or_zero(values, ops.not_equal(weights, 0)) * weights


def nan_unless(condition: Tensor, value: Tensor) -> Tensor:
    """`value` where the condition is True, NaN elsewhere."""
    if uses_xla():
        return ops.where(condition, value, ops.full((), float("nan"), value.dtype))
    # No NaN in the program before there is one: tools that look for NaN look at constants too.
    return value + ops.sqrt(ops.where(condition, ops.zeros((), value.dtype), -ops.ones((), value.dtype)))
