"""Workarounds for XLA:CPU, as TensorFlow 2.18 to 2.21 and JAX 0.7 to 0.10 ship it. A file to delete one day.

| weakness                                                             | workaround             |
|----------------------------------------------------------------------|------------------------|
| the terms of a row's sum are written to memory before the sum        | `map_row_blocks`,      |
| (https://github.com/openxla/xla/issues/49131 has smaller programs)   | `row_sum`, `row_max`   |
| the same of a short row, unless it is a product with a row of ones   | `sums_short_rows`      |
| slicing 16-bit floats makes a float32 copy of the whole array        | `bits_of`, `from_bits` |
| a cast from float32 to bfloat16 takes as long as an exponential      | `cast_to_nearest_even` |
| log1p is computed number by number, and log too in a sum (JAX 0.10); | `_logarithms.py`       |
| elsewhere a logarithm takes twice the time of an exponential         |                        |
| a product is written to memory before it is added to an accumulator  | `accumulate_matmul`    |
| a factor with few rows is copied whole before it is multiplied       | `matmul_over_classes`  |
| a product whose left factor is transposed takes half as long again   | `_linear_loop.py`      |
| what is updated in place later gets memory of its own                | `_exponentials.py`     |
| a sum that compares is 4 times as slow as one of an array in memory: | `row_sum`,             |
| 0.5 to 0.9 of a step's time (TensorFlow 2.21, JAX 0.10)              | `_fast_steps.py`       |

`python -m tools.bench.workarounds` measures what each gains. Accelerators need none of them.
"""

import contextvars
import math
import os
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_xent import _backend
from keras_xent._backend import fori_loop, matmul, rows_of, update_rows, uses_xla_cpu
from keras_xent._types import Shape, Tensor
from keras_xent.kernels._dtypes import accumulator_dtype, dtype_of, narrow_float

# A block of rows of this size, in float32, stays in the caches with the arrays that are computed from it: 256 KB for
# each core. A smaller block XLA gives to one thread: dense [2048, 32000] on two cores, 146 -> 241 ms.
_BLOCK_BYTES = 2**18 * min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)
# A function of many operations takes less time on larger blocks: XLA starts and ends each on all threads.
_LARGE_BLOCK = 4
# The sum over one slice has few accumulators, of several rows only one; longer slices would lose digits, and each slice
# is summed in parts.
_MAX_SLICE = 8192
_PARTS = 16
# Where the XLA of TensorFlow 2.21 and that of JAX 0.10 differ; each name is one thing that TensorFlow's does:
# - A sum computes its terms: the slices of a long row, and of a short row what is multiplied by a vector of ones. JAX's
#   sums what is in memory; its product adds slices, and has none of the terms of a short row.
SUM_COMPUTES_TERMS = _backend.XLA_CPU_FUSES_SLICED_SUMS
# - So does a maximum of slices. JAX's has a second array of the size of the logits.
_MAXIMUM_COMPUTES_TERMS = _backend.XLA_CPU_FUSES_SLICED_SUMS
# - 16-bit floats are cast slice by slice. JAX's makes a float32 copy of all before it slices them.
_CASTS_SLICES = _backend.XLA_CPU_FUSES_SLICED_SUMS
# - Each loop takes 15 ms to compile.
COMPILES_SLOWLY = _backend.XLA_CPU_FUSES_SLICED_SUMS

# The sum of the slices, which is smaller the more there are, is in memory where the sum of the row does not compute it.
_MIN_SLICES = 8 if SUM_COMPUTES_TERMS else 16
# Long terms take no longer in few slices. Each repeats them in the program: 8 of the entropy compile in 8 MB more.
_MIN_SLICES_OF_LONG_TERMS = 2 if SUM_COMPUTES_TERMS else 16
_MIN_SLICED_ROW = 2048
# Each slice is a part of the program, and hundreds of them take long to compile.
_MAX_SLICED_ROW = 64 * _MAX_SLICE
# Products with matrices of more than a few strips of this size are computed strip by strip. For smaller ones that would
# take longer: for each strip a part of a factor is copied.
_STRIP_BYTES = 2**23
_FEW_STRIPS = 4
_MOST_NARROW_CLASSES = 4096
_MOST_KEPT_BYTES = 2**24
_FEW_CLASSES = 64
_FEW_TO_COMPILE = 2**17
_inside_block = contextvars.ContextVar("_inside_block", default=False)


def block_size(shape: Shape, *, is_large: bool = False) -> int:
    """Returns the number of rows of an array of this shape that fit into the cache, or of a large block."""
    rows = max(1, _BLOCK_BYTES // max(1, 4 * math.prod(d or 1 for d in shape[1:])))
    return _LARGE_BLOCK * rows if is_large else rows


def map_row_blocks(
    function: Callable,
    arrays: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
    *,
    in_place: bool = False,
    is_large: bool = False,
) -> tuple[Tensor, ...]:
    """`results`, overwritten by what `function` returns for one block of rows of `arrays` after the other.

    Arrays with one row are passed whole. With `in_place` the first result takes the memory of the first array; then the
    rows of a block have to divide the number of rows. Blocks are large with `is_large`, if these divide it.
    """
    num_rows = ops.shape(arrays[0])[0]
    size: Any = block_size(arrays[0].shape)
    is_symbolic = not (isinstance(num_rows, int) or ops.is_tensor(num_rows))  # as `jax.export` has it
    if is_symbolic or rows_of(arrays[0]) != arrays[0].shape[0] or (isinstance(num_rows, int) and num_rows <= size):
        return _run_block(function, arrays)
    if is_large:
        large = block_size(arrays[0].shape, is_large=True)
        is_divisor = num_rows % large == 0
        size = (large if is_divisor else size) if isinstance(num_rows, int) else ops.where(is_divisor, large, size)
    if isinstance(num_rows, int):
        # As even as they can be: the last block computes again what is missing to a whole one.
        size = -(-num_rows // -(-num_rows // size))
    else:
        size = ops.minimum(size, num_rows)
    num_blocks = -(-num_rows // (size if isinstance(size, int) else ops.maximum(size, 1)))

    def body(i, results):
        # The last block starts earlier instead of being shorter: it computes some rows a second time, to the same.
        start = ops.minimum(i * size, num_rows - size)
        current = (results[0], *arrays[1:]) if in_place else arrays
        pieces = _run_block(function, [a if a.shape[0] == 1 else _slice_rows(a, start, size) for a in current])
        return tuple(update_rows(result, start, piece) for result, piece in zip(results, pieces, strict=True))

    return fori_loop(num_blocks, body, (arrays[0], *results[1:]) if in_place else tuple(results))


def _run_block(function, blocks):
    token = _inside_block.set(True)
    try:
        return function(*blocks)
    finally:
        _inside_block.reset(token)


def _slice_rows(array, start, size):
    return ops.slice(array, (start, *[0] * (len(array.shape) - 1)), (size, *ops.shape(array)[1:]))


def bits_of(array: Tensor, dtype: str) -> Tensor:
    """16-bit floats as integers, which XLA:CPU slices without a copy; `dtype` is theirs, or "" for other arrays.

    Read from outside a compiled program, TensorFlow takes the same bits for integers at no cost.
    """
    return _backend.bitcast(array, "uint16") if dtype else array


def from_bits(array: Tensor, dtype: str) -> Tensor:
    """The reverse of `bits_of`."""
    return _backend.bitcast(array, dtype) if dtype else array


def row_sum(term: Callable, *arrays: Tensor, is_long_term: bool = False) -> Tensor:
    """`sum(term(*arrays), axis=1, keepdims=True)`; of long rows without `term(*arrays)` in memory.

    The arrays have `C` columns, or one that is broadcast; the number of columns is that of the first. Only for terms
    that XLA fuses whole: one that uses an expensive function twice is written to memory after all. `is_long_term` says
    that a term has dozens of operations.
    """
    return _reduce_slices(term, ops.add, ops.sum, arrays, _MIN_SLICES_OF_LONG_TERMS if is_long_term else _MIN_SLICES)


def row_max(values: Callable, array: Tensor) -> Tensor:
    """`max(values(array), axis=1, keepdims=True)`, as `row_sum`."""
    if not _MAXIMUM_COMPUTES_TERMS:
        return ops.max(values(array), axis=1, keepdims=True)
    return _reduce_slices(values, ops.maximum, ops.max, (array,), _MIN_SLICES)


def sums_in_slices(rows: Tensor) -> bool:
    """Whether `row_sum` of these rows, outside of a block, leaves its terms out of memory."""
    columns = rows.shape[1]
    is_long = len(rows.shape) == 2 and columns is not None and _MIN_SLICED_ROW <= columns <= _MAX_SLICED_ROW
    return is_long and (_CASTS_SLICES or not narrow_float(rows)) and uses_xla_cpu()


def sums_short_rows(rows: Tensor) -> bool:
    """Whether `row_sum` of these rows, outside of a block, leaves its terms out of memory unless they are few.

    It is a product with a vector of ones: XLA fuses the terms into it, if the vector is below 16 KB
    (`kFusionThresholdBytes` of `cpu_instruction_fusion.cc`).
    """
    columns = rows.shape[1]
    is_short = len(rows.shape) == 2 and columns is not None and columns < _MIN_SLICED_ROW
    return is_short and SUM_COMPUTES_TERMS and not _inside_block.get() and uses_xla_cpu()


def is_compiled_fast(rows: Tensor) -> bool:
    """Whether so few numbers take less time to run than one loop more to compile."""
    num_rows, columns = rows_of(rows), rows.shape[1]
    is_known = isinstance(num_rows, int) and isinstance(columns, int)
    return COMPILES_SLOWLY and uses_xla_cpu() and is_known and num_rows * columns < _FEW_TO_COMPILE


def _reduce_slices(term, combine, reduce, arrays, fewest):
    if _inside_block.get() or not sums_in_slices(arrays[0]):
        terms = term(*arrays)
        if combine is ops.add and sums_short_rows(arrays[0]) and not is_compiled_fast(arrays[0]):
            return _sum_of_columns(terms)
        return reduce(terms, axis=1, keepdims=True)
    columns = arrays[0].shape[1]
    # Cast before they are sliced, 16-bit floats are cast inside the fused program; after, slice by slice.
    arrays = [ops.cast(a, "float32") if narrow_float(a) else a for a in arrays]
    num_slices = max(fewest, columns // _MAX_SLICE)
    width = columns // num_slices // _PARTS * _PARTS
    rest = columns - num_slices * width
    bounds = [(i * width, (i + 1) * width) for i in range(num_slices)]
    partial, *others = (term(*[a if a.shape[1] == 1 else a[:, i:j] for a in arrays]) for i, j in bounds)
    for other in others:
        partial = combine(partial, other)  # [rows, width]
    parts = ops.reshape(partial, (-1, width // _PARTS))  # [rows * parts, width / parts]
    is_product = combine is ops.add and not SUM_COMPUTES_TERMS
    total = _sum_of_columns(parts) if is_product else reduce(parts, axis=1)
    total = ops.reshape(total, (-1, _PARTS))
    while total.shape[1] > 1:
        # Not a second sum, which XLA would make one with the first.
        half = total.shape[1] // 2
        total = combine(total[:, :half], total[:, half:])
    if rest:
        tail = term(*[a if a.shape[1] == 1 else a[:, columns - rest :] for a in arrays])
        total = combine(total, reduce(tail, axis=1, keepdims=True))
    return total


def _sum_of_columns(terms):
    return matmul(terms, ops.ones((terms.shape[1], 1), terms.dtype))


def keeps_exponentials(logits: Tensor) -> bool:
    """Whether a program of both passes is faster if its forward pass keeps the exponentials for the backward pass.

    Then it runs without blocks, as XLA is fast at sums of what is in memory (YNN, TensorFlow 2.21, JAX 0.10).
    TensorFlow's keeps those of short rows by itself, and has sums in slices for long ones, which need no memory: of
    these, up to 16 MB are kept. Exponentials are float32: of long rows of 16-bit floats, reading them takes longer than
    blocks.
    """
    if not uses_xla_cpu():
        return False
    if sums_short_rows(logits) or (SUM_COMPUTES_TERMS and not is_small(logits)):
        return False
    return not narrow_float(logits) or logits.shape[1] <= _MOST_NARROW_CLASSES


def has_few_classes(logits: Tensor) -> bool:
    """Whether a row is so short that what XLA does for each row takes longer than its numbers."""
    return isinstance(logits.shape[1], int) and logits.shape[1] <= _FEW_CLASSES


def is_small(logits: Tensor) -> bool:
    """Whether an array of the size of the logits is of known size, and takes up to 16 MB."""
    shape = (rows_of(logits), *logits.shape[1:])
    return all(isinstance(n, int) for n in shape) and 4 * math.prod(shape) <= _MOST_KEPT_BYTES


def cast_to_nearest_even(x: Tensor, dtype: Any) -> Tensor:
    """`x` in the dtype, rounded to nearest even."""
    if dtype != "bfloat16" or dtype_of(x) != "float32" or not uses_xla_cpu():
        return ops.cast(x, dtype)
    return _backend.round_to_bfloat16(x)


def matmul_over_classes(gradient: Tensor, kernel: Tensor, *, transpose: bool) -> Tensor:
    """`gradient @ kernel` `[n, D]` for a kernel `[V, D]` (`[D, V]` with `transpose`), summed by strips of classes."""
    num_classes, features = kernel.shape[1 if transpose else 0], kernel.shape[0 if transpose else 1]
    strips = _num_strips(num_classes, features)
    if not uses_xla_cpu() or strips <= _FEW_STRIPS:
        return matmul(gradient, kernel, transpose_b=transpose)
    rows = ops.shape(gradient)[0]

    def add_strip(start, width, total):
        begin, shape = ((0, start), (features, width)) if transpose else ((start, 0), (width, features))
        columns = ops.slice(gradient, (0, start), (rows, width))
        return total + matmul(columns, ops.slice(kernel, begin, shape), transpose_b=transpose)

    return _in_strips(add_strip, strips, num_classes, ops.zeros((rows, features), accumulator_dtype(gradient)))


def accumulate_matmul(total: Tensor, product: Callable, gradient: Tensor, *, classes_first: bool) -> Tensor:
    """`total + product(gradient)`, in strips of classes where the product is large; the product alone without a total.

    `gradient` is `[tokens, V]`; `total` is `[V, D]` with `classes_first`, else `[D, V]`.
    """
    if total is None:
        return product(gradient)
    axis = 0 if classes_first else 1
    num_classes, features = total.shape[axis], total.shape[1 - axis]
    strips, rows = _num_strips(num_classes, features), gradient.shape[0]
    # Of few tokens, the copy of the logits' gradient is smaller than the product.
    fewest = 1 if rows is not None and rows <= features else _FEW_STRIPS
    if not uses_xla_cpu() or strips <= fewest:
        return total + product(gradient)

    def add_strip(start, width, total):
        columns = ops.slice(gradient, (0, start), (ops.shape(gradient)[0], width))
        begin, shape = ((start, 0), (width, features)) if classes_first else ((0, start), (features, width))
        return ops.slice_update(total, begin, ops.slice(total, begin, shape) + product(columns))

    return _in_strips(add_strip, strips, num_classes, total)


def _num_strips(num_classes, features):
    return -(-4 * num_classes * features // _STRIP_BYTES)


def _in_strips(function, strips, num_classes, state):
    """The state after `function(start, width, state)` for each strip."""
    width = num_classes // strips
    state = fori_loop(strips, lambda i, state: function(i * width, width, state), state)
    rest = num_classes - strips * width
    return function(strips * width, rest, state) if rest else state
