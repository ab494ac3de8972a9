"""A function and its gradient as one program, with JAX."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from keras_xent._backend._jax_gradients import is_traced
from keras_xent._backend._jax_rows import pad_to_bucket, take_rows
from keras_xent._backend._xla import uses_xla
from keras_xent._types import Tensor


def starts_programs(*tensors: Tensor) -> bool:
    """Whether what is computed now is compiled by itself: not where there is no XLA, nor inside a program."""
    return uses_xla() and not is_traced()


def reads_variables_once() -> bool:
    """Whether a program is being made, which keeps the value of a variable that is not among its inputs."""
    return is_traced()


def is_concrete(tensor: Tensor) -> bool:
    """Whether the results of a program of `tensor` can be read now: also where it is differentiated."""
    return not isinstance(tensor, jax.core.Tracer) or tensor.to_concrete_value() is not None


def one_program(function: Callable) -> Callable:
    """`function(x, y, valid, weights, num_rows)`, whose gradient is computed with its value, in one program.

    See the function of this name for TensorFlow.
    """

    def with_aux(*inputs):
        value, *aux = function(*inputs)
        return value, tuple(aux)

    program = jax.jit(with_aux)

    @functools.cache
    def with_gradients(needed):
        return jax.jit(jax.value_and_grad(with_aux, needed, True))

    @jax.custom_vjp
    def value(*inputs):
        padded, num_rows = _padded(*inputs)
        return _taken(program(*padded, num_rows), num_rows, inputs[0].shape[0])

    def forward_rule(*inputs):
        needed = tuple(i for i, one in enumerate(inputs) if one is not None and one.perturbed)
        inputs = jax.tree.map(lambda leaf: leaf.value, inputs)
        rows, nothing = inputs[0].shape[0], tuple(None for _ in inputs)
        padded, num_rows = _padded(*inputs)
        if not needed:
            return _taken(program(*padded, num_rows), num_rows, rows), nothing
        results, slopes = with_gradients(needed)(*padded, num_rows)
        slopes = take_rows(slopes, None if num_rows is None else rows)
        slopes = tuple(slopes[needed.index(i)] if i in needed else None for i in range(len(inputs)))
        return _taken(results, num_rows, rows), slopes

    def vjp(slopes, upstreams):
        upstream = upstreams[0]
        if isinstance(upstream, jax.custom_derivatives.SymbolicZero):
            return tuple(None for _ in slopes)
        return tuple(None if s is None else _scaled(s, upstream) for s in slopes)

    value.defvjp(forward_rule, vjp, symbolic_zeros=True)
    return value


def _taken(results, num_rows, rows):
    value, (of_rows, others) = results
    return value, take_rows(of_rows, None if num_rows is None else rows), others


def _padded(*inputs):
    given = [one for one in inputs if one is not None]
    padded, num_rows = pad_to_bucket(given)
    rows = iter(padded)
    return tuple(None if one is None else next(rows) for one in inputs), (
        None if num_rows is None else np.array([num_rows], "int32")
    )


@jax.jit
def _scaled(slope, upstream):
    return (slope.astype(upstream.dtype) * upstream).astype(slope.dtype)
