"""Compiling with JAX, and functions with gradients of their own."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy

from keras_xent._backend._finite import where_finite
from keras_xent._backend._jax_mesh import vary_alike
from keras_xent._backend._jax_rows import append_zeros, pad_inputs, take_rows
from keras_xent._backend._xla import uses_xla
from keras_xent._types import Tensor


def is_eager(tensor: Tensor) -> bool:
    """Returns whether the values of `tensor` can be read now: not in a traced program, even if it is closed over."""
    return not isinstance(tensor, jax.core.Tracer) and not is_traced()


def is_traced() -> bool:
    """Whether operations are part of a program now, as under `jit`; under `grad` alone they are not."""
    return isinstance(jax.lax.neg(numpy.float32(0)), jax.core.Tracer)


def jit(function: Callable) -> Callable:
    """`function` of tensors, compiled by XLA once for each set of shapes and dtypes."""
    return jax.jit(function)


def custom_gradient(
    forward: Callable,
    backward: Callable,
    *,
    has_rows: tuple[bool, ...] = (),
    keep: Callable = lambda *_, **__: None,
    keeps: Callable[..., bool] = lambda *_, **__: False,
    step: Any = None,
    **of_tensorflow: Any,
) -> Callable:
    """Joins `forward` and `backward` into a function that is differentiated in its first argument.

    See the function of this name for TensorFlow, which has the same parts. Here forward and backward pass of a step are
    parts of one program: where `keeps(x, *nondiff_args, **options)`, the forward pass runs without blocks, and what it
    then has in memory, `keep(residuals, x, *nondiff_args, **options)`, is one more residual. Where `step.fits(x,
    *nondiff_args, **options)` too, `step` has the `forward`, `backward` and `keep` to use in place of these.
    """

    def kernel(x: Tensor, *nondiff_args: Tensor, **options: Any) -> Tensor:
        is_kept = uses_xla() and is_traced() and keeps(x, *nondiff_args, **options)
        parts = getattr(forward, "unblocked", forward), backward, keep
        if is_kept and step is not None and step.fits(x, *nondiff_args, **options):
            parts = step.forward, step.backward, step.keep

        @jax.custom_vjp
        def value(*inputs):
            padded, num_rows = pad_inputs(inputs, has_rows)
            return take_rows(forward(*padded, **options)[0], num_rows)

        unblocked = functools.partial(parts[0], **options)

        @jax.custom_jvp
        def residuals(*inputs):
            result, saved = unblocked(*inputs) if is_kept else forward(*inputs, **options)
            return result, saved

        @residuals.defjvp
        def residuals_jvp(inputs, tangents):
            result, saved = residuals(*inputs)
            _, tangents = jax.jvp(unblocked, where_finite(saved, inputs), _where_finite_tangents(saved, tangents))
            return (result, saved), tangents

        kept = _kept(parts[2], options)

        def forward_rule(*inputs):
            # What is saved keeps the rows that were added.
            padded, num_rows = pad_inputs(inputs, has_rows)
            result, saved = residuals(*padded) if num_rows is None else forward(*padded, **options)
            saved = (*saved, kept(saved, padded)) if is_kept else saved
            return take_rows(result, num_rows), (saved, padded)

        def vjp(saved_and_inputs, upstream):
            saved, inputs = saved_and_inputs
            num_rows, missing = upstream.shape[0], inputs[0].shape[0] - upstream.shape[0]
            upstream = append_zeros(upstream, missing) if missing else upstream
            gradient = take_rows(parts[1](upstream, saved, *inputs, **options), num_rows if missing else None)
            return gradient, *[None] * len(nondiff_args)

        value.defvjp(forward_rule, vjp)
        return value(*vary_alike((x, *nondiff_args)))

    return kernel


def _kept(keep, options):
    @jax.custom_jvp
    def kept(saved, inputs):
        return keep(saved, *inputs, **options)

    @kept.defjvp
    def kept_jvp(given, tangents):
        # As of residuals: rows that are not finite have no derivative.
        saved = given[0]
        clean = tuple(where_finite(saved, arrays) for arrays in given)
        tangents = tuple(_where_finite_tangents(saved, arrays) for arrays in tangents)
        return kept(*given), jax.jvp(lambda saved, inputs: keep(saved, *inputs, **options), clean, tangents)[1]

    return kept


def _where_finite_tangents(saved, tangents):
    return tuple(t if t.dtype == jax.dtypes.float0 else where_finite(saved, [t])[0] for t in tangents)


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
        return value(*vary_alike((tuple(inputs), tuple(nondiff_args))))

    return kernel


def with_gradient_of_sum(total: Callable) -> Callable:
    """`total(values)`, a sum in some order, differentiated as a sum: without the order's slices and paddings."""
    result = jax.custom_jvp(total)
    result.defjvp(lambda values, tangents: (result(*values), jax.numpy.sum(tangents[0])))
    return result


def with_slope(function: Callable, slope: Callable) -> Callable:
    """`function(x)`, number by number, differentiated as one whose derivative is `slope(x)`."""
    result = jax.custom_jvp(function)
    result.defjvp(lambda x, tangent: (result(*x), tangent[0] * slope(*x)))
    return result


def clear_programs() -> None:
    """Nothing: this module keeps no programs."""
