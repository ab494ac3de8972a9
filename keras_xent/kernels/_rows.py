"""How a kernel reduces long rows on a CPU without writing the terms of the sum to memory.

XLA:CPU makes the terms of a long row's sum in memory before it adds them up. Two ways round that, measured in
docs/performance.md: a loop over blocks of rows that stay in the cache, and, where TensorFlow compiles a sum of terms
that are simple enough to be fused, cutting the row into slices that are added first. Accelerators need neither.
"""

import contextvars
import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_xent.kernels._compile import by_xla_on_cpu, callable_at, compiled, loop, with_attributes, with_rows

_BACKEND = keras.backend.backend()

if _BACKEND == "tensorflow":
    import tensorflow as tf
else:
    import jax

_BLOCK_BYTES = 2**21
_FEWEST_SLICES = 8
# A sum of one slice is made by few accumulators; a longer one would lose digits.
_LONGEST_SLICE = 8192
_SHORTEST_SLICED_ROW = 2048
# Each slice is a part of the program, and hundreds of them take long to compile.
_LONGEST_SLICED_ROW = 64 * _LONGEST_SLICE
_in_a_block = contextvars.ContextVar("_in_a_block", default=False)


def compiled_by_rows(outputs: int, blocked: Callable[..., bool]) -> Callable:
    """`compiled` for a function of rows that must not make anything of the size of its input on a CPU.

    The function takes `[rows, classes, ...]` and arrays with as many rows, or with one that is broadcast. It returns
    `(value, saved)`, `outputs` arrays in all with one column each. Where `blocked(**static)` says so, a CPU runs it on
    one block of rows after the other.
    """

    def decorate(function):
        def by_rows(*arrays, formats, **static):
            if not by_xla_on_cpu() or not blocked(**static):
                return function(*arrays, **static)

            def on_block(*blocks):
                value, saved = function(*map(_read, blocks, formats), **static)
                return value, *saved

            rows = arrays[0]
            dtype = "float64" if "float64" in str(rows.dtype) else "float32"
            column = ops.zeros((ops.shape(rows)[0], 1, *ops.shape(rows)[2:]), dtype)
            value, *saved = in_blocks(on_block, arrays, (column,) * outputs)
            return value, tuple(saved)

        program = compiled(by_rows)

        def at(*arrays, **static):
            # XLA:CPU slices no 16-bit floats: it would make a float32 copy of the whole array. It does slice integers,
            # and seen from outside a compiled program TensorFlow takes the same bits for integers at no cost.
            formats = tuple(_format(a) if blocked(**static) and by_xla_on_cpu() else "" for a in arrays)
            arrays = tuple(_bits(a, "uint16") if f else a for a, f in zip(arrays, formats, strict=True))
            return program.at(*arrays, formats=formats, **static)

        # A loop of unknown length has no derivative in XLA: who needs one (of the statistics, for second derivatives)
        # takes the function in one piece.
        return with_attributes(callable_at(at), in_one_piece=compiled(function))

    return decorate


def rows_of_a_block(shape: tuple) -> int:
    """How many rows of an array of this shape stay in the cache."""
    return max(1, _BLOCK_BYTES // max(1, 4 * math.prod(d or 1 for d in shape[1:])))


def in_blocks(function: Callable, arrays: tuple, results: tuple, *, in_place: bool = False) -> tuple:
    """`results`, overwritten by what `function` returns for one block of rows of `arrays` after the other.

    Arrays with one row are given whole. With `in_place` the first result takes the memory of the first array; the rows
    of a block then have to divide the number of rows.
    """
    count = ops.shape(arrays[0])[0]
    size = rows_of_a_block(arrays[0].shape)
    if isinstance(count, int) and count <= size:
        return _inside(function, arrays)
    if not isinstance(count, int):
        size = ops.minimum(size, count)
    blocks = -(-count // (size if isinstance(size, int) else ops.maximum(size, 1)))

    def block(i, results):
        # The last block begins earlier instead of being shorter: it gives some rows a second time, and the same.
        start = ops.minimum(i * size, count - size)
        current = (results[0], *arrays[1:]) if in_place else arrays
        pieces = _inside(function, [a if a.shape[0] == 1 else _block(a, start, size) for a in current])
        return tuple(with_rows(result, start, piece) for result, piece in zip(results, pieces, strict=True))

    return loop(blocks, block, (arrays[0], *results[1:]) if in_place else tuple(results))


def _inside(function, blocks):
    token = _in_a_block.set(True)
    try:
        return function(*blocks)
    finally:
        _in_a_block.reset(token)


def _block(array, start, size):
    return ops.slice(array, (start, *[0] * (len(array.shape) - 1)), (size, *ops.shape(array)[1:]))


def _format(array):
    name = str(getattr(array.dtype, "name", array.dtype))
    return name if name in ("bfloat16", "float16") else ""


def _read(block, format):
    return _bits(block, format) if format else block


def _bits(array, dtype):
    return tf.bitcast(array, dtype) if _BACKEND == "tensorflow" else jax.lax.bitcast_convert_type(array, dtype)


def selected(value: Any, where: Any) -> Any:
    """`value` where it is True, elsewhere 0 whatever the value holds, NaN included; all of it for None."""
    if where is None:
        return value
    # One zero: zeros of a known shape are a constant to TensorFlow, which inside `jit_compile=True` lies in memory.
    return ops.where(where, value, ops.zeros((), value.dtype))


def times(weight: Any, value: Any) -> Any:
    """`weight * value`, where 0 times an infinite loss is 0."""
    return selected(weight * value, ops.not_equal(weight, 0.0))


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
    sliced = columns is not None and _SHORTEST_SLICED_ROW <= columns <= _LONGEST_SLICED_ROW
    if _BACKEND == "jax" or not by_xla_on_cpu() or not sliced or _in_a_block.get():
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


def rounded(x: Any, dtype: Any) -> Any:
    """`x` in the dtype, rounded to nearest even."""
    if _BACKEND == "jax" or dtype != "bfloat16" or x.dtype != "float32" or not by_xla_on_cpu():
        return ops.cast(x, dtype)

    # XLA:CPU's own conversion takes as long as the exponential before it.
    @tf.custom_gradient
    def by_bits(x):
        bits, half = _bits(x, "uint32"), tf.constant(16, "uint32")
        odd = tf.bitwise.right_shift(bits, half) & 1
        # What is NaN must not be carried over into the sign.
        bits = tf.where(tf.math.is_nan(x), bits | 0x400000, bits + 0x7FFF + odd)
        upper = tf.cast(tf.bitwise.right_shift(bits, half), "uint16")
        return _bits(upper, "bfloat16"), lambda upstream: tf.cast(upstream, x.dtype)

    return by_bits(x)
