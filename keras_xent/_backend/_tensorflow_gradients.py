"""Compiling with TensorFlow, and functions with gradients of their own."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.eager.forwardprop_util import pack_tangents

from keras_xent._backend._finite import where_finite
from keras_xent._backend._tensorflow_graph import in_branch_of_xla, in_xla
from keras_xent._backend._tensorflow_rows import append_rows, pad_inputs, take_rows, with_rounded_rows
from keras_xent._backend._xla import uses_xla
from keras_xent._types import Tensor


def is_eager(tensor: Tensor) -> bool:
    """Returns whether the values of `tensor` can be read now: not in a traced graph, even if it is closed over."""
    return tf.executing_eagerly() and not tf.is_symbolic_tensor(tensor)


def jit(function: Callable) -> Callable:
    """`function` of tensors, compiled by XLA once for each set of shapes and dtypes."""
    # No reduce_retracing: it relaxes two ranks to an unknown one, which XLA refuses.
    traced = tf.function(function, jit_compile=True, autograph=False)
    # A trace for each shape is meant: no reason to warn.
    traced._omit_frequent_tracing_warning = True
    return traced


def custom_gradient(
    forward: Callable,
    backward: Callable,
    *,
    has_rows: tuple[bool, ...] = (),
    keeps: Callable[..., bool] = lambda x, **_: False,
    step: Any = None,
    **of_jax: Any,
) -> Callable:
    """Joins `forward` and `backward` into a function that is differentiated in its first argument.

    `forward(x, *nondiff_args, **options)` returns `(value, residuals)`: the residuals are the few numbers per row that
    make the gradient cheap. `backward(upstream, residuals, x, *nondiff_args, **options)` returns the gradient for `x`.

    Two custom gradients, one inside the other, make higher derivatives right:

        value      d value / d x            = backward(upstream, residuals(x, ...), x, ...)
        residuals  d residuals / d inputs   = derivative of `forward` without its loops over blocks, computed again

    `has_rows` says which arguments have rows, whose number is rounded up to a bucket (`_buckets.py`); nothing is
    rounded for functions that are not compiled, where it is empty.

    In a program of XLA, which has forward and backward pass in it, `step` has the `forward` and `backward` to use in
    place of these, and what is kept in memory between them, `keep`: where `keeps(x)` and `step.fits(x, *nondiff_args,
    **options)`.
    """

    def kernel(x: Tensor, *nondiff_args: Tensor, **options: Any) -> Tensor:
        is_step = step is not None and _is_step(x) and keeps(x, any_rows=_keeps_gradient.get())
        is_step = is_step and step.fits(x, *nondiff_args, **options)
        run, run_backward = (step.forward, step.backward) if is_step else (forward, backward)
        # An eager tape must not record the inside of `forward`: each intermediate of the compiled program would become
        # an output of [rows, classes] size. A graph computes these only where they are needed, and there they are
        # what tangents of forward mode pass through.
        inputs = (x, *nondiff_args) if is_eager(x) else captured((x, *nondiff_args))
        x, nondiff_args = inputs[0], inputs[1:]
        stopped = tuple(map(tf.stop_gradient, inputs)) if is_eager(x) else inputs
        # Here and not around the kernel, where a tape would record that rows are added and taken away.
        padded, num_rows = pad_inputs(stopped, has_rows) if is_eager(x) else (inputs, None)
        result, saved = run(*padded, **options)

        @tf.custom_gradient
        def value(*given):
            def vjp(upstream):
                x, nondiff_args = given[0], given[1:]
                if num_rows is not None:
                    upstream, x, nondiff_args = append_rows(upstream, padded[0]), append_rows(x, padded[0]), padded[1:]
                inputs = captured((x, *nondiff_args))
                connected = residuals(*inputs, *captured(saved)) if saved else saved
                if is_step:
                    connected = (*connected, _kept(step.keep, connected, inputs, options))
                gradient = run_backward(upstream, connected, *inputs, **options)
                return take_rows(gradient, num_rows), *[None] * len(nondiff_args)

            return tf.identity(take_rows(result, num_rows)), vjp

        # Stopping the inputs has also cut the residuals off from them, which second derivatives need. The residuals are
        # arguments: the gradient of the gradient of a condition or a loop does not find what the first one closes over.
        @tf.custom_gradient
        def residuals(*given):
            inputs, saved = given[: len(nondiff_args) + 1], given[len(nondiff_args) + 1 :]

            def vjp(*upstream):
                is_program = uses_xla() and not in_branch_of_xla()
                program = _residuals_vjp(forward, tuple(sorted(options.items())), is_program)
                gradients = iter(program(upstream, *captured((saved, inputs))))
                of_inputs = [next(gradients) if i.dtype.is_floating else None for i in inputs]
                return of_inputs + [None] * len(saved)

            return tuple(map(tf.identity, saved)), vjp

        return value(x, *nondiff_args)

    rounded = with_rounded_rows(kernel, has_rows)
    return lambda x, *nondiff_args, **options: (kernel if is_eager(x) else rounded)(x, *nondiff_args, **options)


# Whether a program is being made that keeps the gradient, which is as large as the logits.
_keeps_gradient = contextvars.ContextVar("_keeps_gradient", default=False)


@contextlib.contextmanager
def keeping_gradient() -> Iterator[None]:
    """What is traced inside is differentiated in the same program."""
    token = _keeps_gradient.set(True)
    try:
        yield
    finally:
        _keeps_gradient.reset(token)


def _is_step(x):
    """Whether both passes are parts of one program, and no tangents are asked for, which conditions do not have."""
    return uses_xla() and in_xla() and not in_branch_of_xla() and not pack_tangents([x]).tangents


def _kept(keep, residuals, inputs, options):
    """`keep(residuals, *inputs)`; rows whose residuals are not finite have no derivative."""
    num_residuals = len(residuals)

    @tf.custom_gradient
    def kept(*given):
        def vjp(upstream):
            saved = given[:num_residuals]
            clean = where_finite(saved, given)
            again = keep(clean[:num_residuals], *clean[num_residuals:], **options)
            floats = [array for array in clean if array.dtype.is_floating]
            (upstream,) = where_finite(saved, [upstream])
            gradients = iter(tf.gradients(again, floats, upstream, unconnected_gradients="zero"))
            return [next(gradients) if array.dtype.is_floating else None for array in given]

        return keep(given[:num_residuals], *given[num_residuals:], **options), vjp

    return kept(*residuals, *inputs)


def captured(structure: Any) -> Any:
    """Tensors of other graphs, captured now: of what is captured inside of XLA, `tf.cond` does not find the source.

    The gradient of a condition has its intermediate results captured in one of two ways, by whether XLA compiles the
    operation that needs them, and looks for them in the way of the condition itself (`cond_v2._CondGradFuncGraph`).
    """
    graph = tf.compat.v1.get_default_graph()

    def of_this_graph(tensor):
        is_other = tf.is_symbolic_tensor(tensor) and tensor.graph is not graph
        return tf.identity(tensor) if is_other else tensor

    return tf.nest.map_structure(of_this_graph, structure)


@functools.cache
def _residuals_vjp(forward, options, compiled):
    def vjp(upstream, residuals, inputs):
        upstream, inputs = where_finite(residuals, upstream), where_finite(residuals, inputs)
        # A step has the first of the residuals alone.
        recomputed = getattr(forward, "unblocked", forward)(*inputs, **dict(options))[1][: len(residuals)]
        # Not a tape: forward mode runs this first while it keeps tapes from recording.
        return tf.gradients(
            recomputed, [i for i in inputs if i.dtype.is_floating], upstream, unconnected_gradients="zero"
        )

    if compiled:
        return jit(vjp)
    in_graph = tf.function(vjp, autograph=False)

    def uncompiled(*inputs):
        # Not called by itself, since functions may be set to run eagerly, where there are no `tf.gradients`.
        return in_graph.get_concrete_function(*inputs)(*inputs) if tf.executing_eagerly() else vjp(*inputs)

    return uncompiled


def fused_gradient(forward: Callable, backward: Callable) -> Callable:
    """Joins `forward` and `backward` into a function whose gradients may be formed in the forward pass.

    `forward(inputs, nondiff_args, needs_grad, **options)` returns `(value, aux, residuals)`; `needs_grad` has a bool
    for each input, all False where only the value is needed. `backward(upstream, residuals, inputs, nondiff_args,
    needs_grad, **options)` returns a gradient for each input, None where it is not needed. The result is called as
    `f(inputs, nondiff_args, needs_grad, grad_in_forward, **options)` and returns `(value, aux)`. TensorFlow cannot see
    whether a gradient will be requested, so that `grad_in_forward` says so.

    There are no second derivatives: requesting one raises an error.
    """

    def kernel(inputs, nondiff_args, needs_grad, grad_in_forward, **options):
        given = [i for i, x in enumerate(inputs) if x is not None]
        # Stopped, or an eager tape would record the inside of `forward`.
        stopped = tuple(None if x is None else tf.stop_gradient(x) for x in inputs)
        nondiff_args = tuple(None if x is None else tf.stop_gradient(x) for x in nondiff_args)
        result, aux, residuals = forward(
            stopped, nondiff_args, needs_grad if grad_in_forward else (False,) * len(inputs), **options
        )

        @tf.custom_gradient
        def value(*present):
            return tf.identity(result), lambda upstream: vjp(upstream, *present)

        @tf.custom_gradient
        def vjp(upstream, *present):
            def second_derivative(*_):
                raise NotImplementedError(
                    "`linear_cross_entropy` has no second derivatives on TensorFlow. For these, compute the logits and "
                    "use `sparse_softmax_cross_entropy`."
                )

            arrays = captured((residuals, stopped, nondiff_args))
            gradients = backward(upstream, *arrays, needs_grad, **options)
            return [
                tf.zeros_like(present[n]) if gradients[i] is None else gradients[i] for n, i in enumerate(given)
            ], second_derivative

        return value(*(inputs[i] for i in given)), aux

    return kernel


def with_gradient_of_sum(total: Callable) -> Callable:
    """`total(values)`, a sum in some order, differentiated as a sum: without the order's slices and paddings."""

    @tf.custom_gradient
    def result(values):
        return total(values), lambda upstream: tf.broadcast_to(upstream, tf.shape(values))

    return result


def clear_programs() -> None:
    """Frees the programs that this module has compiled."""
    _residuals_vjp.cache_clear()
