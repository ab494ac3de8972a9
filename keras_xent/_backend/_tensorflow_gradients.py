"""Compiling with TensorFlow, and functions with gradients of their own."""

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_xent._backend._buckets import example_rows
from keras_xent._backend._finite import where_finite
from keras_xent._backend._tensorflow_graph import has_tangents, in_branch_of_xla, in_control_flow, in_xla
from keras_xent._backend._tensorflow_rows import append_rows, pad_inputs, take_rows, with_rounded_rows
from keras_xent._backend._tensorflow_traces import call_traced, clear_traces, is_traced_once
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
    keeps: Callable[..., bool] = lambda *_, **__: False,
    step: Any = None,
    small_step: Any = None,
    is_often_needed: bool = True,
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
    place of these, and what is kept in memory between them, `keep`: where `keeps(x, *nondiff_args, **options)` and
    `step.fits(x, *nondiff_args, **options)`. `small_step` is for arrays so small that a program of them takes longer
    to compile than to run.

    Where the gradient is seldom needed, it is computed only for what a tape watches, and the function is traced with
    each program that it is a part of: of one that has been traced before, all gradients are differentiated again.
    """

    def kernel(x: Tensor, *nondiff_args: Tensor, **options: Any) -> Tensor:
        of_step = None
        if small_step is not None and example_rows.get() is not None and small_step.fits(x, *nondiff_args, **options):
            of_step = small_step
        elif step is not None and _is_step(x) and keeps(x, *nondiff_args, **options):
            of_step = step if step.fits(x, *nondiff_args, **options) else None
        run, run_backward = (forward, backward) if of_step is None else (of_step.forward, of_step.backward)
        # An eager tape must not record the inside of `forward`: each intermediate of the compiled program would become
        # an output of [rows, classes] size. A graph computes these only where they are needed, and there they are
        # what tangents of forward mode pass through.
        inputs = (x, *nondiff_args) if is_eager(x) else captured((x, *nondiff_args))
        x, nondiff_args = inputs[0], inputs[1:]
        stopped = tuple(map(tf.stop_gradient, inputs)) if is_eager(x) else inputs
        # Here and not around the kernel, where a tape would record that rows are added and taken away.
        padded, num_rows = pad_inputs(stopped, has_rows) if is_eager(x) else (inputs, None)
        result, saved = run(*padded, **options)
        if example_rows.get() is not None:
            # What is handed from the forward to the backward pass of a function gets an upstream gradient, if only of
            # 0, and 0 times the derivative of a row that is not finite is NaN.
            result, saved = tf.nest.map_structure(tf.stop_gradient, (result, saved))
        kept = None
        if of_step is not None and of_step is small_step:
            # Not computed again: TensorFlow takes 7 ms to compile each exponential before XLA finds that two are one.
            *saved, kept = saved

        # Of a function of `x` alone a tape does not ask for the gradient when it watches only the other arguments.
        others, is_alone = nondiff_args, not is_often_needed and not in_control_flow()

        @tf.custom_gradient
        def value(*given):
            def vjp(upstream):
                x, nondiff_args = given[0], others if is_alone else given[1:]
                if num_rows is not None:
                    upstream, x, nondiff_args = append_rows(upstream, padded[0]), append_rows(x, padded[0]), padded[1:]
                inputs = captured((x, *nondiff_args))
                connected = residuals(*inputs, *captured(saved)) if saved else saved
                if of_step is not None:
                    connected = (*connected, _kept(of_step.keep, connected, inputs, options, captured(kept)))
                gradient = run_backward(upstream, connected, *inputs, **options)
                return take_rows(gradient, num_rows), *[None] * (len(given) - 1)

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

        return value(x) if is_alone else value(x, *nondiff_args)

    rounded = with_rounded_rows(kernel, has_rows)

    def call(x: Tensor, *nondiff_args: Tensor, **options: Any) -> Tensor:
        if is_eager(x):
            return kernel(x, *nondiff_args, **options)
        if has_rows and is_often_needed and is_traced_once((x, *nondiff_args)):
            return call_traced(kernel, (x, *nondiff_args), options)
        return rounded(x, *nondiff_args, **options)

    return call


def _is_step(x):
    """Whether both passes are parts of one program, and no tangents are asked for, which conditions do not have."""
    return uses_xla() and in_xla() and not in_branch_of_xla() and not has_tangents(x)


def _kept(keep, residuals, inputs, options, result):
    """`keep(residuals, *inputs)`, which may be there; rows whose residuals are not finite have no derivative."""
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

        if result is None:
            return keep(given[:num_residuals], *given[num_residuals:], **options), vjp
        return tf.identity(result), vjp

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
                    "What is computed without logits has no second derivatives on TensorFlow. For these, compute the "
                    "logits, and use a loss or kernel of logits, such as `sparse_softmax_cross_entropy`."
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


def with_slope(function: Callable, slope: Callable) -> Callable:
    """`function(x)`, number by number, differentiated as one whose derivative is `slope(x)`."""

    @tf.custom_gradient
    def result(x):
        return function(x), lambda upstream: upstream * slope(x)

    return result


def clear_programs() -> None:
    """Frees the programs of this backend."""
    _residuals_vjp.cache_clear()
    clear_traces()
