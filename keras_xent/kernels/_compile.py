"""The one place that knows how a kernel is compiled.

A kernel is a pair of pure functions written with `keras.ops`: `forward` and `backward`. Both are compiled by XLA,
through `tf.function(jit_compile=True)` on TensorFlow and `jax.jit` on JAX. By convention a function's positional
arguments are tensors and its keyword arguments are Python values that are part of the compiled program.
"""

import functools
from collections.abc import Callable
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

# XLA:CPU as TensorFlow ships it reduces a row about twice as fast when the row is cut into a few slices that are added
# first (measured: docs/performance.md). Elsewhere one plain reduction is best.
_SLICES = 8
_SHORTEST_SLICED_ROW = 2048


def compiled(function: Callable) -> Callable:
    """`function`, compiled by XLA. One compilation per set of shapes, dtypes and keyword values."""
    if _BACKEND == "tensorflow":
        # No reduce_retracing: it would relax two ranks to an unknown one, which XLA refuses.
        return tf.function(function, jit_compile=True, autograph=False)

    @functools.cache
    def program(**static):
        return jax.jit(functools.partial(function, **static))

    @functools.wraps(function)
    def call(*tensors, **static):
        return program(**static)(*tensors)

    return call


def differentiable(forward: Callable, backward: Callable) -> Callable:
    """Joins `forward` and `backward` into a function that is differentiated in its first argument.

    `forward(x, *others, **static)` returns `(value, saved)`, `saved` being whatever small statistics make the
    gradient cheap; `backward(upstream, saved, x, *others, **static)` returns the gradient for `x`. The other arguments
    get no gradient from this function, but higher derivatives through `backward` reach all of them.
    """
    return _differentiable_tf(forward, backward) if _BACKEND == "tensorflow" else _differentiable_jax(forward, backward)


def _differentiable_tf(forward, backward):
    def kernel(x, *others, **static):
        # Inputs are stopped so that an eager tape does not record the inside of `forward`: recording would turn every
        # intermediate of the compiled program into an output of [rows, classes] size.
        value, saved = forward(*map(tf.stop_gradient, (x, *others)), **static)

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
                with tf.GradientTape() as tape:
                    tape.watch(inputs)
                    again = forward(*inputs, **static)[1]
                return tape.gradient(again, inputs, list(upstream))

            return tuple(map(tf.identity, saved)), gradient

        return connect(x, *others)

    return kernel


def _differentiable_jax(forward, backward):
    def kernel(x, *others, **static):
        @jax.custom_vjp
        def connect(*inputs):
            return forward(*inputs, **static)[0]

        def first(*inputs):
            value, saved = forward(*inputs, **static)
            return value, (saved, inputs)

        def second(residuals, upstream):
            saved, inputs = residuals
            return backward(upstream, saved, *inputs, **static), *[None] * len(others)

        connect.defvjp(first, second)
        return connect(x, *others)

    return kernel


def row_sum(term: Callable, *arrays: Any) -> Any:
    """`sum(term(*arrays), axis=1, keepdims=True)` without `term(*arrays)` in memory.

    The arrays have `C` columns, or one that is broadcast; the number of columns is that of the first.
    """
    columns = arrays[0].shape[1]
    if columns is None or columns < _SHORTEST_SLICED_ROW or not _slices_pay():
        return ops.sum(term(*arrays), axis=1, keepdims=True)
    width, rest = divmod(columns, _SLICES)
    slices = [(i * width, (i + 1) * width) for i in range(_SLICES)]
    cut = [[a if a.shape[1] == 1 else a[:, i:j] for a in arrays] for i, j in slices]
    partial = term(*cut[0])
    for slice_ in cut[1:]:
        partial = partial + term(*slice_)
    total = ops.sum(partial, axis=1, keepdims=True)
    if rest:
        tail = [a if a.shape[1] == 1 else a[:, columns - rest :] for a in arrays]
        total = total + ops.sum(term(*tail), axis=1, keepdims=True)
    return total


def _slices_pay() -> bool:
    return _BACKEND == "tensorflow" and not accelerated()


def accelerated() -> bool:
    """Whether an accelerator is at hand, on which a check of values would make the device wait."""
    if _BACKEND == "tensorflow":
        return any(device.device_type != "CPU" for device in tf.config.list_logical_devices())
    return jax.default_backend() != "cpu"


def is_eager(tensor: Any) -> bool:
    """Whether the values of `tensor` can be looked at now."""
    if _BACKEND == "tensorflow":
        return not tf.is_tensor(tensor) or isinstance(tensor, tf.__internal__.EagerTensor)
    return not isinstance(tensor, jax.core.Tracer)


def assert_in_graph(condition: Any, data: list) -> None:
    """On a TensorFlow graph that runs on the CPU, an assertion; elsewhere nothing.

    XLA drops assertions, and on an accelerator they would cost a transfer at every step.
    """
    if _BACKEND == "tensorflow" and not accelerated():
        tf.debugging.Assert(condition, data, summarize=1)
