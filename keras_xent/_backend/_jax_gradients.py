"""Compiling with JAX, and functions with gradients of their own."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy

from keras_xent._backend._finite import where_finite
from keras_xent._backend._jax_rows import append_zeros, pad_inputs, take_rows
from keras_xent._types import Tensor


def is_eager(tensor: Tensor) -> bool:
    """Returns whether the values of `tensor` can be read now: not in a traced program, even if it is closed over."""
    if isinstance(tensor, jax.core.Tracer):
        return False
    # Under `jit`, operations on concrete arrays are part of the program; under `grad` alone they are not.
    return not isinstance(jax.lax.neg(numpy.float32(0)), jax.core.Tracer)


def jit(function: Callable) -> Callable:
    """`function` of tensors, compiled by XLA once for each set of shapes and dtypes."""
    return jax.jit(function)


def custom_gradient(forward: Callable, backward: Callable, *, has_rows: tuple[bool, ...] = ()) -> Callable:
    """Joins `forward` and `backward` into a function that is differentiated in its first argument.

    See the function of this name for TensorFlow, which has the same parts.
    """

    def kernel(x: Tensor, *nondiff_args: Tensor, **options: Any) -> Tensor:
        @jax.custom_vjp
        def value(*inputs):
            padded, num_rows = pad_inputs(inputs, has_rows)
            return take_rows(forward(*padded, **options)[0], num_rows)

        @jax.custom_jvp
        def residuals(*inputs):
            return forward(*inputs, **options)

        @residuals.defjvp
        def residuals_jvp(inputs, tangents):
            result, saved = residuals(*inputs)
            tangents = [t if t.dtype == jax.dtypes.float0 else where_finite(saved, [t])[0] for t in tangents]
            recomputed = functools.partial(getattr(forward, "unblocked", forward), **options)
            _, tangents = jax.jvp(recomputed, where_finite(saved, inputs), tuple(tangents))
            return (result, saved), tangents

        def forward_rule(*inputs):
            # What is saved keeps the rows that were added.
            padded, num_rows = pad_inputs(inputs, has_rows)
            result, saved = residuals(*padded) if num_rows is None else forward(*padded, **options)
            return take_rows(result, num_rows), (saved, padded)

        def vjp(saved_and_inputs, upstream):
            saved, inputs = saved_and_inputs
            num_rows, missing = upstream.shape[0], inputs[0].shape[0] - upstream.shape[0]
            upstream = append_zeros(upstream, missing) if missing else upstream
            gradient = take_rows(backward(upstream, saved, *inputs, **options), num_rows if missing else None)
            return gradient, *[None] * len(nondiff_args)

        value.defvjp(forward_rule, vjp)
        return value(x, *nondiff_args)

    return kernel


def fused_gradient(forward: Callable, backward: Callable) -> Callable:
    """Joins `forward` and `backward` into a function whose gradients may be formed in the forward pass.

    See the function of this name for TensorFlow. JAX sees by itself whether, and in what, something is differentiated:
    `needs_grad` can only narrow it, and `grad_in_forward` is not used. Second derivatives are JAX's own.
    """

    def kernel(inputs, nondiff_args, needs_grad, grad_in_forward, **options):
        @jax.custom_vjp
        def value(inputs, nondiff_args):
            result, aux, _ = forward(inputs, nondiff_args, (False,) * len(inputs), **options)
            return result, aux

        def forward_rule(inputs, nondiff_args):
            needed = tuple(x is not None and x.perturbed and need for x, need in zip(inputs, needs_grad, strict=True))
            inputs, nondiff_args = jax.tree.map(lambda leaf: leaf.value, (inputs, nondiff_args))
            result, aux, residuals = forward(inputs, nondiff_args, needed, **options)
            # The structure of what is saved is static, and so tells `vjp` which gradients are needed.
            return (result, aux), (residuals, inputs, nondiff_args, tuple(() if need else None for need in needed))

        def vjp(saved, upstreams):
            residuals, inputs, nondiff_args, needed = saved
            upstream = upstreams[0]
            no_gradients = tuple(None for _ in inputs), tuple(None for _ in nondiff_args)
            if isinstance(upstream, jax.custom_derivatives.SymbolicZero):
                return no_gradients
            needed = tuple(need is not None for need in needed)
            return tuple(backward(upstream, residuals, inputs, nondiff_args, needed, **options)), no_gradients[1]

        value.defvjp(forward_rule, vjp, symbolic_zeros=True)
        return value(tuple(inputs), tuple(nondiff_args))

    return kernel


def clear_programs() -> None:
    """Nothing: this module keeps no programs."""
