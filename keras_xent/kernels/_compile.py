"""The one place that knows how a kernel is compiled.

A kernel is a pair of pure functions written with `keras.ops`: `forward` and `backward`. Both are compiled by XLA,
through `tf.function(jit_compile=True)` on TensorFlow and `jax.jit` on JAX. By convention a function's positional
arguments are tensors and its keyword arguments are Python values that are part of the compiled program.
"""

import contextvars
import functools
import math
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

# XLA:CPU makes the terms of a long row's sum in memory before it adds them up. Two ways round that, measured in
# docs/performance.md: a loop over blocks of rows that stay in the cache, and, where TensorFlow compiles a sum of terms
# that are simple enough to be fused, cutting the row into slices that are added first. Accelerators need neither.
_BLOCK_BYTES = 2**21
_FEWEST_SLICES = 8
# A sum of one slice is made by few accumulators; a longer one would lose digits.
_LONGEST_SLICE = 8192
_SHORTEST_SLICED_ROW = 2048
_in_a_block = contextvars.ContextVar("_in_a_block", default=False)


def as_written(function: Callable) -> Any:
    """`function`, kept from AutoGraph, which would rewrite everything that a user's `tf.function` calls."""
    return tf.autograph.experimental.do_not_convert(function) if _BACKEND == "tensorflow" else function


def compiled(function: Callable) -> Any:
    """`function`, compiled by XLA. One compilation per set of shapes, dtypes and keyword values.

    Its attribute `at(*tensors, **static)` gives the program for these arguments and the program's own arguments.
    """

    @functools.cache
    def program(static):
        def run(*tensors):
            return function(*tensors, **dict(static))

        if _BACKEND == "tensorflow":
            # No reduce_retracing: it would relax two ranks to an unknown one, which XLA refuses.
            traced = tf.function(run, jit_compile=True, autograph=False)
            # One trace for each shape is meant, and no reason to warn.
            traced._omit_frequent_tracing_warning = True
            return traced
        return jax.jit(run)

    return _callable_at(lambda *tensors, **static: (program(tuple(sorted(static.items()))), tensors))


def _callable_at(at):
    def call(*tensors, **static):
        program, arguments = at(*tensors, **static)
        return program(*arguments)

    return _with(call, at=at)


def _with(function: Any, **attributes: Any) -> Any:
    vars(function).update(attributes)
    return function


def compiled_by_rows(outputs: int, blocked: Callable[..., bool]) -> Callable:
    """`compiled` for a function of rows that must not make anything of the size of its input on a CPU.

    The function takes `[rows, classes, ...]` and arrays with as many rows, or with one that is broadcast. It returns
    `(value, saved)`, `outputs` arrays in all with one column each. Where `blocked(**static)` says so, a CPU runs it on
    one block of rows after the other.
    """

    def decorate(function):
        def by_rows(*arrays, formats, **static):
            if accelerated() or not blocked(**static):
                return function(*arrays, **static)
            return _in_blocks(function, outputs, arrays, formats, static)

        program = compiled(by_rows)

        def at(*arrays, **static):
            # XLA:CPU slices no 16-bit floats: it would make a float32 copy of the whole array. It does slice integers,
            # and seen from outside a compiled program TensorFlow takes the same bits for integers at no cost.
            formats = tuple(_format(a) if blocked(**static) and not accelerated() else "" for a in arrays)
            arrays = tuple(_bits(a, "uint16") if f else a for a, f in zip(arrays, formats, strict=True))
            return program.at(*arrays, formats=formats, **static)

        # A loop of unknown length has no derivative in XLA: who needs one (of the statistics, for second derivatives)
        # takes the function in one piece.
        return _with(_callable_at(at), in_one_piece=compiled(function))

    return decorate


def _in_blocks(function, outputs, arrays, formats, static):
    rows = arrays[0]
    count = ops.shape(rows)[0]
    size = max(1, _BLOCK_BYTES // max(1, 4 * math.prod(d or 1 for d in rows.shape[1:])))
    whole = isinstance(count, int) and count <= size
    if isinstance(count, int):
        blocks = -(-count // size)
    else:
        size = ops.minimum(size, count)
        blocks = -(-count // ops.maximum(size, 1))

    def on_block(start):
        pieces = (a if whole or a.shape[0] == 1 else _block(a, start, size) for a in arrays)
        in_block = _in_a_block.set(True)
        try:
            return function(*(_bits(p, f) if f else p for p, f in zip(pieces, formats, strict=True)), **static)
        finally:
            _in_a_block.reset(in_block)

    if whole:
        return on_block(0)

    def block(i, results):
        # The last block begins earlier instead of being shorter: it gives some rows a second time, and the same.
        start = ops.minimum(i * size, count - size)
        value, saved = on_block(start)
        return tuple(
            ops.slice_update(result, (start, *[0] * (len(result.shape) - 1)), piece)
            for result, piece in zip(results, (value, *saved), strict=True)
        )

    empty = ops.zeros((count, 1, *ops.shape(rows)[2:]), "float64" if "float64" in str(rows.dtype) else "float32")
    value, *saved = ops.fori_loop(0, blocks, block, (empty,) * outputs)
    return value, tuple(saved)


def _block(array, start, size):
    return ops.slice(array, (start, *[0] * (len(array.shape) - 1)), (size, *ops.shape(array)[1:]))


def _format(array):
    name = str(getattr(array.dtype, "name", array.dtype))
    return name if name in ("bfloat16", "float16") else ""


def _bits(array, dtype):
    return tf.bitcast(array, dtype) if _BACKEND == "tensorflow" else jax.lax.bitcast_convert_type(array, dtype)


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
                    tape.watch([i for i in inputs if i.dtype.is_floating])
                    again = getattr(forward, "in_one_piece", forward)(*inputs, **static)[1]
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
    """`sum(term(*arrays), axis=1, keepdims=True)`, on TensorFlow's XLA:CPU without `term(*arrays)` in memory.

    The arrays have `C` columns, or one that is broadcast; the number of columns is that of the first. Only for terms of
    which XLA fuses every part: one that uses an expensive function twice is made in memory after all.
    """
    return _sliced(term, ops.add, ops.sum, arrays)


def row_max(values: Callable, array: Any) -> Any:
    """`max(values(array), axis=1, keepdims=True)`, as `row_sum`."""
    return _sliced(values, ops.maximum, ops.max, (array,))


def _sliced(term, combine, reduce, arrays):
    columns = arrays[0].shape[1]
    short = columns is None or columns < _SHORTEST_SLICED_ROW
    if _BACKEND == "jax" or accelerated() or short or _in_a_block.get():
        return reduce(term(*arrays), axis=1, keepdims=True)
    # Converted before they are cut, 16-bit floats are converted inside the fused program; after, slice by slice.
    arrays = [ops.cast(a, "float32") if _format(a) else a for a in arrays]
    slices = max(_FEWEST_SLICES, columns // _LONGEST_SLICE)
    width, rest = divmod(columns, slices)
    cuts = [(i * width, (i + 1) * width) for i in range(slices)]
    partial, *others = (term(*[a if a.shape[1] == 1 else a[:, i:j] for a in arrays]) for i, j in cuts)
    for other in others:
        partial = combine(partial, other)
    total = reduce(partial, axis=1, keepdims=True)
    if rest:
        tail = term(*[a if a.shape[1] == 1 else a[:, columns - rest :] for a in arrays])
        total = combine(total, reduce(tail, axis=1, keepdims=True))
    return total


@functools.cache
def accelerated() -> bool:
    """Whether programs run on an accelerator, or on several devices, rather than on the one CPU."""
    if _BACKEND == "tensorflow":
        return any(device.device_type != "CPU" for device in tf.config.list_logical_devices())
    return jax.default_backend() != "cpu" or jax.device_count() > 1


def widest_int() -> str:
    """The widest integer dtype at hand: JAX has no int64 unless asked."""
    return "int64" if _BACKEND == "tensorflow" else str(jax.dtypes.canonicalize_dtype("int64"))


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
