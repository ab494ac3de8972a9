"""A function and its gradient as one program, with TensorFlow."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_xent._backend._tensorflow_gradients import captured, is_eager, jit
from keras_xent._backend._tensorflow_graph import in_xla
from keras_xent._backend._tensorflow_rows import append_rows, pad_to_bucket, take_rows
from keras_xent._backend._xla import uses_xla
from keras_xent._types import Tensor


def starts_programs() -> bool:
    """Whether what is called now is compiled by itself: not where there is no XLA, nor inside a program of it."""
    return uses_xla() and not in_xla()


def reads_variables_once() -> bool:
    """Whether a program keeps the value of a variable that is not among its inputs: it reads it each time."""
    return False


def is_concrete(tensor: Tensor) -> bool:
    """Whether the value of `tensor` can be read now."""
    return not tf.is_symbolic_tensor(tensor)


def one_program(function: Callable) -> Callable:
    """`function(x, y, valid, num_rows)`, whose gradient for `x` is computed with its value, in one program.

    It returns `(value, rows, others)`: a scalar, and tensors without a gradient, of which the first have rows. Its
    arguments have rows; `valid` may be None.
    The number of rows is rounded up to a bucket: `num_rows`, `[1]`, says how many there were, None that all are there.
    What is differentiated twice, or in `y`, is compiled when it is needed.
    """

    @jit
    def program(x, *others):
        value, *aux = function(x, *others)
        return value, *aux, tf.gradients(value, x)[0]

    @jit
    def second_derivative(upstream, x, *others):
        (gradient,) = tf.gradients(function(x, *others)[0], x)
        return tf.gradients(gradient, x, upstream, unconnected_gradients="zero")[0]

    @jit
    def gradient_for_y(upstream, x, y, *others):
        gradient = tf.gradients(function(x, y, *others)[0], y, unconnected_gradients="zero")[0]
        return gradient * tf.cast(upstream, gradient.dtype)

    def call(x: Tensor, y: Tensor, valid: Tensor) -> tuple[Tensor, Any, Any]:
        eager = is_eager(x)
        # An eager tape must not record what is inside. In a graph, eager tensors become part of it: the gradient of
        # `tf.cond` refuses what is not (`cond_v2._resolve_grad_inputs`, TensorFlow 2.21).
        given = tuple(None if t is None else tf.stop_gradient(t) if eager else _of_graph(t) for t in (x, y, valid))
        y = y if eager else given[1]
        padded, num_rows = pad_to_bucket(given)
        others = (*padded[1:], tf.constant([num_rows]) if isinstance(num_rows, int) else num_rows)
        result, rows, rest, slope = program(padded[0], *others)
        # In a graph the padding is differentiated; in eager mode nobody sees it.
        taken = num_rows if eager else None
        slope = take_rows(slope, taken)

        @tf.custom_gradient
        def value(x, y):
            def vjp(upstream):
                slope, constants = gradient(x), captured(others)
                for_x = _scaled(slope, upstream)
                if not y.dtype.is_floating:
                    return for_x, None
                x_rows = captured(padded[0])
                return for_x, take_rows(gradient_for_y(upstream, x_rows, *constants), taken)

            return tf.identity(result), vjp

        @tf.custom_gradient
        def gradient(x):
            def vjp(upstream):
                both = [upstream, x] if taken is None else [append_rows(t, padded[0]) for t in (upstream, x)]
                return take_rows(second_derivative(*both, *captured(others)), taken)

            return tf.identity(captured(slope)), vjp

        y = y if eager else padded[1]
        return value(x if eager else padded[0], y), take_rows(rows, num_rows), rest

    return call


def _of_graph(tensor):
    return tensor if tf.is_symbolic_tensor(tensor) else tf.identity(tensor)


def _scaled(slope, upstream):
    if slope.dtype == upstream.dtype:
        return slope * upstream
    return _scaled_in_float32(slope, upstream)


@jit
def _scaled_in_float32(slope, upstream):
    return tf.cast(tf.cast(slope, upstream.dtype) * upstream, slope.dtype)
