"""A function and its gradient as one program, with TensorFlow."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_xent._backend._tensorflow_gradients import captured, is_eager, jit
from keras_xent._backend._tensorflow_graph import has_tangents, in_xla
from keras_xent._backend._tensorflow_rows import append_rows, pad_to_bucket, take_rows
from keras_xent._backend._xla import uses_xla
from keras_xent._types import Tensor


def starts_programs(*tensors: Tensor) -> bool:
    """Whether what is computed of `tensors` now is compiled by itself.

    Not where there is no XLA, nor inside a program of it, nor in forward mode: TensorFlow 2.21 finds no tangents for a
    program that has gradients in it.
    """
    # Of a variable, what is read.
    return (
        uses_xla() and not in_xla() and not has_tangents(*(tf.convert_to_tensor(t) for t in tensors if t is not None))
    )


def reads_variables_once() -> bool:
    """Whether a program keeps the value of a variable that is not among its inputs: it reads it each time."""
    return False


def is_concrete(tensor: Tensor) -> bool:
    """Whether the results of a program of `tensor` can be read now."""
    return is_eager(tensor)


def one_program(function: Callable) -> Callable:
    """`function(x, y, valid, weights, num_rows)`, whose gradient for `x` is computed with its value, in one program.

    It returns `(value, rows, others)`: a scalar, and tensors without a gradient, of which the first have rows. Its
    arguments have rows; all but `x` may be None.
    The number of rows is rounded up to a bucket: `num_rows`, `[1]`, says how many there were, None that all are there.
    What is differentiated twice, or in another input than `x`, is compiled when it is needed.
    """

    @jit
    def program(x, *others):
        value, *aux = function(x, *others)
        return value, *aux, tf.gradients(value, x)[0]

    @jit
    def second_derivatives(upstream, x, *others):
        (gradient,) = tf.gradients(function(x, *others)[0], x)
        return tf.gradients(gradient, [x, *_floats(others)], upstream, unconnected_gradients="zero")

    @jit
    def gradients_of_others(upstream, x, *others):
        gradients = tf.gradients(function(x, *others)[0], _floats(others), unconnected_gradients="zero")
        return [gradient * tf.cast(upstream, gradient.dtype) for gradient in gradients]

    def call(*inputs: Tensor) -> tuple[Tensor, Any, Any]:
        eager = is_eager(inputs[0])
        # An eager tape must not record what is inside. In a graph, eager tensors become part of it: the gradient of
        # `tf.cond` refuses what is not (`cond_v2._resolve_grad_inputs`, TensorFlow 2.21).
        given = tuple(None if t is None else tf.stop_gradient(t) if eager else _of_graph(t) for t in inputs)
        padded, num_rows = pad_to_bucket(given)
        constants = (*padded, tf.constant([num_rows]) if isinstance(num_rows, int) else num_rows)
        result, rows, rest, slope = program(*constants)
        # In a graph the padding is differentiated; in eager mode nobody sees it.
        taken = num_rows if eager else None
        slope = take_rows(slope, taken)

        def with_floats(floats):
            """The inputs of the program, of which those of a float type are these."""
            rows = iter(captured(floats) if taken is None else [append_rows(t, padded[0]) for t in floats])
            return [next(rows) if _is_float(t) else captured(t) for t in constants]

        # Apart, so that a tape asks for the gradients of what it watches alone.
        @tf.custom_gradient
        def value(x):
            def vjp(upstream):
                others = [captured(t) for t in constants if not _is_float(t) and t is not None]
                return _scaled(gradient(*captured((x, *floats[1:])), *others, captured(slope)), upstream)

            return tf.identity(result), vjp

        @tf.custom_gradient
        def zero(*others):
            def vjp(upstream):
                of_others = gradients_of_others(upstream, *with_floats((floats[0], *others)))
                return [take_rows(one, taken) for one in of_others]

            return tf.zeros_like(result), vjp

        # All that it needs are arguments: the gradient of the gradient of a condition or a loop does not find what the
        # first one closes over.
        @tf.custom_gradient
        def gradient(*given):
            watched, others, slope = given[: len(floats)], given[len(floats) : -1], given[-1]

            def vjp(upstream):
                upstream = upstream if taken is None else append_rows(upstream, padded[0])
                rows = iter(captured(watched) if taken is None else [append_rows(t, padded[0]) for t in watched])
                rest = iter(captured(others))
                parts = [None if t is None else next(rows if _is_float(t) else rest) for t in constants]
                of_floats = [take_rows(one, taken) for one in second_derivatives(upstream, *parts)]
                return of_floats + [None] * (len(others) + 1)

            return tf.identity(slope), vjp

        # In eager mode the inputs themselves, which may be variables that a tape watches.
        floats = [t for t, one in zip(inputs, given, strict=True) if _is_float(one)] if eager else _floats(padded)
        total = value(floats[0]) + zero(*floats[1:]) if len(floats) > 1 else value(floats[0])
        return total, take_rows(rows, num_rows), rest

    return call


def _is_float(tensor):
    return tensor is not None and tensor.dtype.is_floating


def _floats(tensors):
    return [tensor for tensor in tensors if _is_float(tensor)]


def _of_graph(tensor):
    return captured(tensor) if tf.is_symbolic_tensor(tensor) else tf.identity(tensor)


def _scaled(slope, upstream):
    if slope.dtype == upstream.dtype:
        return slope * upstream
    return _scaled_in_float32(slope, upstream)


@jit
def _scaled_in_float32(slope, upstream):
    return tf.cast(tf.cast(slope, upstream.dtype) * upstream, slope.dtype)
