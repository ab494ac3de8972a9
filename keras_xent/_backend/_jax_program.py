"""A function and its gradient as one program, with JAX."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from keras_xent._backend._jax_gradients import is_traced
from keras_xent._backend._jax_rows import pad_to_bucket, take_rows
from keras_xent._backend._xla import uses_xla
from keras_xent._types import Tensor


def starts_programs() -> bool:
    """Whether what is called now is compiled by itself: not where there is no XLA, nor inside a program."""
    return uses_xla() and not is_traced()


def reads_variables_once() -> bool:
    """Whether a program is being made, which keeps the value of a variable that is not among its inputs."""
    return is_traced()


def is_concrete(tensor: Tensor) -> bool:
    """Whether the value of `tensor` can be read now: also of what is differentiated outside of programs."""
    return not isinstance(tensor, jax.core.Tracer) or tensor.to_concrete_value() is not None


def one_program(function: Callable) -> Callable:
    """`function(x, y, valid, num_rows)`, whose gradient is computed with its value, in one program.

    See the function of this name for TensorFlow.
    """

    def with_aux(*inputs):
        value, *aux = function(*inputs)
        return value, tuple(aux)

    program = jax.jit(with_aux)
    gradients: dict[tuple[int, ...], Callable] = {
        needed: jax.jit(jax.value_and_grad(with_aux, needed, True)) for needed in ((0,), (1,), (0, 1))
    }

    @jax.custom_vjp
    def value(x, y, valid):
        rows = x.shape[0]
        (x, y, valid), num_rows = _padded(x, y, valid)
        return _taken(program(x, y, valid, num_rows), num_rows, rows)

    def forward_rule(x, y, valid):
        needed = tuple(i for i, one in enumerate((x, y)) if one.perturbed)
        x, y, valid = jax.tree.map(lambda leaf: leaf.value, (x, y, valid))
        rows = x.shape[0]
        (x, y, valid), num_rows = _padded(x, y, valid)
        if not needed:
            return _taken(program(x, y, valid, num_rows), num_rows, rows), (None, None)
        results, slopes = gradients[needed](x, y, valid, num_rows)
        slopes = take_rows(slopes, None if num_rows is None else rows)
        slopes = tuple(slopes[needed.index(i)] if i in needed else None for i in (0, 1))
        return _taken(results, num_rows, rows), slopes

    def vjp(slopes, upstreams):
        upstream = upstreams[0]
        if isinstance(upstream, jax.custom_derivatives.SymbolicZero):
            return None, None, None
        return (*(None if s is None else _scaled(s, upstream) for s in slopes), None)

    value.defvjp(forward_rule, vjp, symbolic_zeros=True)

    def call(x: Tensor, y: Tensor, valid: Tensor) -> tuple[Tensor, Any, Any]:
        result, (rows, others) = value(x, y, valid)
        return result, rows, others

    return call


def _taken(results, num_rows, rows):
    value, (of_rows, others) = results
    return value, (take_rows(of_rows, None if num_rows is None else rows), others)


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
