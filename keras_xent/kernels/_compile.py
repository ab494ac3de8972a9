"""The one place that knows how a kernel is compiled.

A kernel is a pair of pure functions written with `keras.ops`: `forward` and `backward`. Both are compiled by XLA,
through `tf.function(jit_compile=True)` on TensorFlow and `jax.jit` on JAX. By convention a function's positional
arguments are tensors and its keyword arguments are Python values that are part of the compiled program.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

_BACKEND = keras.backend.backend()

if _BACKEND == "tensorflow":
    import tensorflow as tf
elif _BACKEND == "jax":
    import jax
else:
    raise ImportError(
        "keras_xent serves the Keras backends 'tensorflow' and 'jax', and Keras runs on "
        f"'{_BACKEND}': set the environment variable KERAS_BACKEND to one of the two before importing keras."
    )


def as_written(function: Callable) -> Any:
    """`function`, kept from AutoGraph, which would rewrite everything that a user's `tf.function` calls."""
    return tf.autograph.experimental.do_not_convert(function) if _BACKEND == "tensorflow" else function


# What every `compiled` function keeps its programs in.
_kept: list[Any] = []
_by_xla = contextvars.ContextVar("_by_xla", default=True)


@contextlib.contextmanager
def as_operations() -> Iterator[None]:
    """Kernels that a TensorFlow graph calls inside become plain operations of it, for places where there is no XLA."""
    token = _by_xla.set(False)
    try:
        yield
    finally:
        _by_xla.reset(token)


def compiled(function: Callable) -> Any:
    """`function`, compiled by XLA. One compilation per set of shapes, dtypes and keyword values.

    Its attribute `at(*tensors, **static)` gives the program for these arguments and the program's own arguments.
    """

    @functools.cache
    def program(static, by_xla):
        def run(*tensors):
            return function(*tensors, **dict(static))

        if not by_xla:
            return run
        if _BACKEND == "tensorflow":
            # No reduce_retracing: it would relax two ranks to an unknown one, which XLA refuses.
            traced = tf.function(run, jit_compile=True, autograph=False)
            # One trace for each shape is meant, and no reason to warn.
            traced._omit_frequent_tracing_warning = True
            return traced
        return jax.jit(run)

    _kept.append(program)
    return callable_at(lambda *tensors, **static: (program(tuple(sorted(static.items())), _by_xla.get()), tensors))


def forget() -> None:
    """Frees all compiled programs, for processes that have called kernels with very many shapes and options."""
    for program in _kept:
        program.cache_clear()


def callable_at(at: Callable) -> Callable:
    """A function that runs the program which `at` gives for its arguments, and has `at` as attribute."""

    def call(*tensors, **static):
        program, arguments = at(*tensors, **static)
        return program(*arguments)

    return with_attributes(call, at=at)


def with_attributes(function: Any, **attributes: Any) -> Any:
    """The function itself, with attributes."""
    vars(function).update(attributes)
    return function


def differentiable(forward: Callable, backward: Callable) -> Callable:
    """Joins `forward` and `backward` into a function that is differentiated in its first argument.

    `forward(x, *others, **static)` returns `(value, saved)`, `saved` being whatever small statistics make the
    gradient cheap; `backward(upstream, saved, x, *others, **static)` returns the gradient for `x`. The other arguments
    get no gradient from this function, but higher derivatives through `backward` reach all of them.
    """
    return _differentiable_tf(forward, backward) if _BACKEND == "tensorflow" else _differentiable_jax(forward, backward)


def _differentiable_tf(forward, backward):
    @compiled
    def pull(upstream, saved, inputs, **static):
        upstream, inputs = _where_finite(saved, upstream), _where_finite(saved, inputs)
        again = getattr(forward, "in_one_piece", forward)(*inputs, **static)[1]
        # Not a tape: forward mode first runs this while it keeps tapes from recording.
        return tf.gradients(again, [i for i in inputs if i.dtype.is_floating], upstream, unconnected_gradients="zero")

    def kernel(x, *others, **static):
        # An eager tape must not record the inside of `forward`: that would turn every intermediate of the compiled
        # program into an output of [rows, classes] size. A graph makes these only for who asks, and there it is the
        # way that tangents of forward mode take.
        inputs = (x, *others)
        value, saved = forward(*(map(tf.stop_gradient, inputs) if is_eager(x) else inputs), **static)

        @tf.custom_gradient
        def connect(x, *others):
            def gradient(upstream):
                again = remember(x, *others) if saved else saved
                return backward(upstream, again, x, *others, **static), *[None] * len(others)

            return tf.identity(value), gradient

        # Stopping the inputs also cut the statistics off from them, which the second derivative needs back. They are
        # computed again, and only if somebody asks for it.
        @tf.custom_gradient
        def remember(*inputs):
            def gradient(*upstream):
                pulled = iter(pull(upstream, saved, inputs, **static))
                return [next(pulled) if i.dtype.is_floating else None for i in inputs]

            return tuple(map(tf.identity, saved)), gradient

        return connect(x, *others)

    return kernel


def _differentiable_jax(forward, backward):
    def kernel(x, *others, **static):
        @jax.custom_vjp
        def connect(*inputs):
            return forward(*inputs, **static)[0]

        @jax.custom_jvp
        def remember(*inputs):
            return forward(*inputs, **static)

        def tangents_of(inputs, tangents):
            value, saved = remember(*inputs)
            tangents = [t if t.dtype == jax.dtypes.float0 else _where_finite(saved, [t])[0] for t in tangents]
            in_one_piece = functools.partial(getattr(forward, "in_one_piece", forward), **static)
            _, tangents = jax.jvp(in_one_piece, _where_finite(saved, inputs), tuple(tangents))
            return (value, saved), tangents

        remember.defjvp(tangents_of)

        def first(*inputs):
            value, saved = remember(*inputs)
            return value, (saved, inputs)

        def second(residuals, upstream):
            saved, inputs = residuals
            return backward(upstream, saved, *inputs, **static), *[None] * len(others)

        connect.defvjp(first, second)
        return connect(x, *others)

    return kernel


def _where_finite(saved, arrays):
    """The arrays, 0 in the rows of which the statistics are not finite: those have no derivative but NaN.

    NaN would get out of rows that do not count by way of the statistics' derivative, 0 times which is asked for there.
    """
    if not saved:
        return tuple(arrays)
    finite = functools.reduce(ops.logical_and, map(ops.isfinite, saved))
    return tuple(ops.where(finite, a, ops.zeros((), a.dtype)) if a.shape[0] == finite.shape[0] else a for a in arrays)


def differentiable_ahead(forward: Callable, backward: Callable) -> Callable:
    """Joins `forward` and `backward` into a function of several inputs that can form their gradients in advance.

    `forward(inputs, others, wanted, **static)` returns `(value, aside, saved)`: what is differentiated, what is not,
    and what the gradient needs; `wanted` has a bool for each input, all False where only the value is asked for.
    `backward(upstream, saved, inputs, others, wanted, **static)` returns a gradient for each input, None where it is
    not wanted. The result is called as `f(inputs, others, wanted, ahead, **static)` and returns `(value, aside)`. JAX
    sees by itself whether, and in what, something is differentiated; TensorFlow has to be told by `ahead` and `wanted`.

    Second derivatives are right where JAX can make them; TensorFlow says that there are none.
    """
    return _ahead_tf(forward, backward) if _BACKEND == "tensorflow" else _ahead_jax(forward, backward)


def _ahead_tf(forward, backward):
    def kernel(inputs, others, wanted, ahead, **static):
        there = [i for i, x in enumerate(inputs) if x is not None]
        stopped = tuple(None if x is None else tf.stop_gradient(x) for x in inputs)
        # Stopped, or an eager tape would record the inside of `forward`.
        others = tuple(None if x is None else tf.stop_gradient(x) for x in others)
        value, aside, saved = forward(stopped, others, wanted if ahead else (False,) * len(inputs), **static)

        @tf.custom_gradient
        def connect(*present):
            def gradient(upstream):
                return first_derivative(upstream, *present)

            return tf.identity(value), gradient

        @tf.custom_gradient
        def first_derivative(upstream, *present):
            def second(*_):
                raise NotImplementedError(
                    "`linear_cross_entropy` has no second derivatives on TensorFlow. For these, compute the logits and "
                    "use `sparse_softmax_cross_entropy`."
                )

            gradients = backward(upstream, saved, stopped, others, wanted, **static)
            return [
                tf.zeros_like(present[n]) if gradients[i] is None else gradients[i] for n, i in enumerate(there)
            ], second

        return connect(*(inputs[i] for i in there)), aside

    return kernel


def _ahead_jax(forward, backward):
    def kernel(inputs, others, wanted, ahead, **static):
        @jax.custom_vjp
        def connect(inputs, others):
            value, aside, _ = forward(inputs, others, (False,) * len(inputs), **static)
            return value, aside

        def first(inputs, others):
            needed = tuple(x is not None and x.perturbed and want for x, want in zip(inputs, wanted, strict=True))
            inputs, others = jax.tree.map(lambda leaf: leaf.value, (inputs, others))
            value, aside, saved = forward(inputs, others, needed, **static)
            # The tree of what is saved is static, and so tells backward which gradients are needed.
            return (value, aside), (saved, inputs, others, tuple(() if need else None for need in needed))

        def second(residuals, upstreams):
            saved, inputs, others, needed = residuals
            upstream = upstreams[0]
            nothing = tuple(None for _ in inputs), tuple(None for _ in others)
            if isinstance(upstream, jax.custom_derivatives.SymbolicZero):
                return nothing
            needed = tuple(need is not None for need in needed)
            return tuple(backward(upstream, saved, inputs, others, needed, **static)), nothing[1]

        connect.defvjp(first, second, symbolic_zeros=True)
        return connect(tuple(inputs), tuple(others))

    return kernel


def dot(a: Any, b: Any, *, transpose_a: bool = False, transpose_b: bool = False) -> Any:
    """The product of two matrices of one dtype; products of 16-bit floats are added up in float32."""
    if _BACKEND == "tensorflow":
        accumulated = tf.float64 if a.dtype == tf.float64 else tf.float32
        return tf.raw_ops.BatchMatMulV3(x=a, y=b, Tout=accumulated, adj_x=transpose_a, adj_y=transpose_b)
    contracted = ((0 if transpose_a else 1,), (1 if transpose_b else 0,))
    accumulated = "float64" if a.dtype == "float64" else "float32"
    return jax.lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=accumulated)


@functools.cache
def accelerated() -> bool:
    """Whether programs run on an accelerator, or on several devices, rather than on the one CPU."""
    if _BACKEND == "tensorflow":
        return any(device.device_type != "CPU" for device in tf.config.list_logical_devices())
    return jax.default_backend() != "cpu" or jax.device_count() > 1


def by_xla_on_cpu() -> bool:
    """Whether kernels are compiled by XLA:CPU, which has to be kept from making long rows in memory."""
    return _by_xla.get() and not accelerated()


def loop(steps: Any, body: Callable, state: Any) -> Any:
    """`state` after `body(i, state)` for each `i` below `steps`, one at a time."""
    if _BACKEND == "jax":
        return ops.fori_loop(0, steps, body, state)
    # Of Keras' loop, TensorFlow would run ten steps at once where nothing compiles it, and hold the logits of each.
    return tf.while_loop(
        lambda i, state: i < steps, lambda i, state: (i + 1, body(i, state)), (0, state), parallel_iterations=1
    )[1]


def with_rows(array: Any, start: Any, rows: Any) -> Any:
    """The array with other rows from `start` on."""
    if _by_xla.get():
        return ops.slice_update(array, (start, *[0] * (len(array.shape) - 1)), rows)
    # The former is an operation of XLA.
    places = start + tf.range(tf.shape(rows)[0])
    return tf.tensor_scatter_nd_update(array, places[:, None], rows)


def read(variable: Any) -> Any:
    """The present value of a variable, as a tensor that later assignments do not change; a tensor is returned as is."""
    value = ops.convert_to_tensor(variable)
    # Keras on TensorFlow gives the `tf.Variable` itself.
    return tf.convert_to_tensor(value) if _BACKEND == "tensorflow" else value


def widest_int() -> str:
    """The widest integer dtype at hand: JAX has no int64 unless asked."""
    return "int64" if _BACKEND == "tensorflow" else str(jax.dtypes.canonicalize_dtype("int64"))


def is_eager(tensor: Any) -> bool:
    """Whether the values of `tensor` can be looked at now."""
    if _BACKEND == "tensorflow":
        if hasattr(tensor, "assign"):
            return tf.executing_eagerly()
        return not tf.is_tensor(tensor) or isinstance(tensor, tf.__internal__.EagerTensor)
    return not isinstance(tensor, jax.core.Tracer)


def assert_in_graph(condition: Any, data: list, tensor: Any = None) -> Any:
    """On a TensorFlow graph that runs on the CPU, an assertion that comes before any use of the returned `tensor`.

    Elsewhere nothing: XLA drops assertions, and on an accelerator they would cost a transfer at every step.
    """
    if _BACKEND != "tensorflow" or accelerated():
        return tensor
    assertion = tf.debugging.Assert(condition, data, summarize=1)
    if tensor is None or assertion is None:
        return tensor
    with tf.control_dependencies([assertion]):
        return tf.identity(tensor)
