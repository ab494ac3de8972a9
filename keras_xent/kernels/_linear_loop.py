"""One pass over the tokens of a linear kernel, in chunks.

For each chunk the logits are computed. A `Rule` turns them into a few numbers per token (losses, statistics) and, in
the same memory, into the gradient of these, which two more matmuls turn into gradients for the hidden states and for
the kernel. So what exists at once is one chunk of logits.

Tokens that are not active (masked, ignored, of weight 0) are moved to the end, and the loop ends before them.
"""

import functools
from typing import Any, NamedTuple

from keras import ops

from keras_xent import _backend
from keras_xent._backend import fori_loop, matmul, on_accelerator, update_rows, uses_xla_cpu
from keras_xent._types import Tensor
from keras_xent.kernels._compiled import CompiledKernel
from keras_xent.kernels._dtypes import accumulator_dtype, is_float
from keras_xent.kernels._masking import where_or_zero
from keras_xent.kernels._xla_cpu import accumulate_matmul, block_size, map_row_blocks

# Bytes of one chunk of logits, and its fewest tokens: each chunk adds once to the kernel's gradient, which has to cost
# little beside the matmuls of its tokens (docs/performance.md).
CPU_CHUNK_BYTES = 2**26
ACCELERATOR_CHUNK_BYTES = 2**29
MIN_CHUNK_TOKENS = 512
# The same where the gradient of the kernel is not computed: each chunk reads the kernel once.
MIN_CHUNK_TOKENS_WITHOUT_KERNEL = 128
# Tokens that are not active are left out by whole chunks: where there may be some, there should be a few chunks.
MIN_CHUNKS_IF_MASKED = 4


class Result(NamedTuple):
    """The results of one pass: arrays `[N, 1]`, and gradients of hidden, kernel and bias, None where not needed."""

    columns: tuple[Tensor, ...]
    gradients: tuple[Tensor, Tensor, Tensor]


class Carry(NamedTuple):
    """The state that the loop carries from chunk to chunk; None for results that are not needed."""

    columns: tuple[Tensor, ...]
    d_hidden: Tensor = None
    d_kernel: Tensor = None
    d_bias: Tensor = None

    def present(self) -> dict[str, Any]:
        """The needed results, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class Data(NamedTuple):
    """The inputs of a rule beside the logits. None has a gradient."""

    # `[N, 1]`: which tokens count; None if all do. Others have columns and gradients of 0.
    is_active: Tensor
    # Arrays `[N, ...]` such as the labels.
    rows: tuple[Tensor, ...]
    # Arrays that all tokens share, such as class weights.
    constants: tuple[Tensor, ...] = ()


def run(inputs: Any, upstream: Tensor, data: Data, **static: Any) -> Result:
    """The columns of a rule, and the needed gradients of `sum(upstream * columns)`.

    `inputs` are hidden `[N, D]`, kernel and bias; `upstream` has a column for each of the rule's values, or is None
    where no gradient is needed. Gradients are not yet rounded to 16 bits.
    """
    hidden, kernel, bias = inputs
    mesh = _backend.batch_mesh(hidden)
    rows: Any = (hidden, upstream, data.is_active, *data.rows)
    tokens = None
    if mesh is None:
        rows, tokens = _backend.pad_to_bucket(rows, kernel.shape[0 if static["transpose"] else 1])
        if tokens is not None and data.is_active is None:
            is_active = ops.arange(ops.shape(rows[0])[0], dtype="int32")[:, None] < tokens
            rows = (*rows[:2], is_active, *rows[3:])
    columns, gradients = _run(tuple(rows), (kernel, bias, *data.constants), mesh=mesh, **static)
    d_hidden, *others = gradients
    return Result(_backend.take_rows(columns, tokens), (_backend.take_rows(d_hidden, tokens), *others))


@CompiledKernel
def _run(rows, replicated, *, mesh, **static):
    on_device = functools.partial(_run_on_device, mesh=mesh, **static)
    return _backend.shard_map_rows(mesh, on_device, rows, replicated, has_rows=(True, (True, False, False)))


def _run_on_device(rows, replicated, *, mesh, needs_grad, transpose, rule, chunk_bytes):
    hidden, upstream, is_active, *arrays = rows
    kernel, bias, *constants = replicated
    dtype = accumulator_dtype(hidden)
    if not on_accelerator():
        # A CPU multiplies 16-bit floats by way of float32 in any case.
        hidden = ops.cast(hidden, dtype)
    kernel = ops.cast(kernel, hidden.dtype)
    arrays, constants = rule.prepare(arrays, constants)
    # Inactive tokens may hold NaN, and 0 * NaN would make the kernel's gradient NaN.
    hidden = where_or_zero(hidden, is_active)
    upstream = None if upstream is None else where_or_zero(upstream, is_active)
    arrays = [where_or_zero(a, is_active) if is_float(a) else a for a in arrays]
    needs_hidden, needs_kernel, needs_bias = needs_grad if upstream is not None else (False,) * 3
    needs_bias = needs_bias and bias is not None
    tokens, features = ops.shape(hidden)
    num_classes = kernel.shape[0 if transpose else 1]
    size, num_chunks = _chunk_sizes(
        tokens,
        num_classes,
        is_masked=is_active is not None,
        copies=rule.num_logits,
        chunk_bytes=chunk_bytes,
        needs_kernel=needs_kernel,
    )
    is_single = isinstance(num_chunks, int) and num_chunks == 1
    order = _active_first(None if is_single else is_active, size, num_chunks)
    # Devices that share the classes go through the loop together, and all wait for the last at its end.
    steps = num_chunks if order.permutation is None else _backend.pmax(mesh, order.num_active_chunks)
    in_order = functools.partial(_pad_rows, permutation=order.permutation, rows=size * num_chunks)
    # [size * num_chunks, ...], active tokens first.
    hidden, upstream, arrays = in_order(hidden), in_order(upstream), [in_order(a) for a in arrays]
    # A product whose left factor is transposed is slow on XLA:CPU: transposed once, for all chunks.
    hidden_t = ops.transpose(hidden) if needs_kernel and not transpose and uses_xla_cpu() else None  # [D, tokens]

    def body(i, carry):
        start = i * size
        chunk, *pieces = (_slice(a, start, size) for a in (hidden, *arrays))
        d_columns = None if upstream is None else _slice(upstream, start, size)
        logits = matmul(chunk, kernel, transpose_b=transpose)  # [size, V]
        if bias is not None:
            logits = logits + ops.cast(bias, dtype)
        d_logits, columns = _apply(rule, logits, rule.arrays(pieces, constants), constants, d_columns)
        carry = carry._replace(
            columns=tuple(update_rows(c, start, new) for c, new in zip(carry.columns, columns, strict=True))
        )
        if upstream is None:
            return carry
        d_logits = ops.cast(d_logits, kernel.dtype)
        if needs_hidden:
            d_chunk = matmul(d_logits, kernel, transpose_b=not transpose)  # [size, D]
            carry = carry._replace(d_hidden=update_rows(carry.d_hidden, start, d_chunk))
        if needs_kernel:

            def product(d_logits):
                if transpose:
                    return matmul(d_logits, chunk, transpose_a=True)  # [V, D]
                if hidden_t is None:
                    return matmul(chunk, d_logits, transpose_a=True)  # [D, V]
                return matmul(ops.slice(hidden_t, (0, start), (features, size)), d_logits)  # [D, V]

            total = accumulate_matmul(carry.d_kernel, product, d_logits, classes_first=transpose)
            carry = carry._replace(d_kernel=total)
        if needs_bias:
            carry = carry._replace(d_bias=carry.d_bias + ops.sum(ops.cast(d_logits, dtype), axis=0))
        return carry

    carry = Carry(
        columns=tuple(ops.zeros((size * num_chunks, 1), dtype) for _ in range(rule.num_columns)),
        d_hidden=ops.zeros((size * num_chunks, features), dtype) if needs_hidden else None,
        # With one chunk the product is the gradient.
        d_kernel=ops.zeros(kernel.shape, dtype) if needs_kernel and not is_single else None,
        d_bias=ops.zeros(bias.shape, dtype) if needs_bias else None,
    )
    if is_single:
        carry = body(0, carry)
    else:
        # TensorFlow's loop carries no None.
        carry = Carry(**fori_loop(steps, lambda i, state: body(i, Carry(**state)).present(), carry.present()))
    restore = functools.partial(_scatter_rows, inverse=order.inverse, tokens=tokens, is_active=is_active)
    gradients = restore(carry.d_hidden), _backend.psum(mesh, carry.d_kernel), _backend.psum(mesh, carry.d_bias)
    return tuple(map(restore, carry.columns)), gradients


def _slice(array, start, size):
    return ops.slice(array, (start, 0), (size, array.shape[1]))


def _apply(rule, logits, arrays, constants, upstream):
    """The gradient for the logits, in their memory (None without `upstream`), and the columns of the rule."""

    def on_block(logits, *arrays):
        upstream, arrays = (arrays[0], arrays[1:]) if has_upstream else (None, arrays)
        columns, residuals = rule.forward(logits, arrays, constants)
        if not has_upstream:
            return columns
        # The gradient takes the memory of the logits. XLA:CPU would copy them for a reader that it does not wait for.
        for column in columns:
            upstream = _add_dependency(upstream, column)
        return rule.backward(upstream, residuals, logits, arrays, constants), *columns

    has_upstream = upstream is not None
    arrays = (logits, upstream, *arrays) if has_upstream else (logits, *arrays)
    if uses_xla_cpu():
        columns = (ops.zeros_like(logits[:, :1]),) * (rule.num_columns + has_upstream)
        results = map_row_blocks(on_block, arrays, columns, in_place=has_upstream)
    else:
        results = on_block(*arrays)
    return (results[0], tuple(results[1:])) if has_upstream else (None, tuple(results))


def _add_dependency(value, other):
    """`value`, made to depend on the other in a way that XLA does not see through."""
    return value + 0.0 * where_or_zero(other, ops.isfinite(other))


def _chunk_sizes(tokens, num_classes, *, is_masked, copies=1, chunk_bytes=None, needs_kernel=True):
    """Tokens of a chunk, and the number of chunks: as even as they can be, and a whole number of blocks each.

    `copies` arrays of the size of the logits exist at once. With `chunk_bytes` a chunk takes no more, unless one token
    does.
    """
    budget = chunk_bytes or (ACCELERATOR_CHUNK_BYTES if on_accelerator() else CPU_CHUNK_BYTES)
    block = block_size((1, num_classes))
    least = MIN_CHUNK_TOKENS if needs_kernel else min(MIN_CHUNK_TOKENS, MIN_CHUNK_TOKENS_WITHOUT_KERNEL)
    most = max(1 if chunk_bytes else least, budget // (4 * num_classes * copies))
    block = min(block, most)
    if isinstance(tokens, int) and is_masked:
        most = min(most, max(1, MIN_CHUNK_TOKENS // 2, -(-tokens // MIN_CHUNKS_IF_MASKED)))
    num_chunks = -(-tokens // most)
    if isinstance(tokens, int):
        size = -(-tokens // max(num_chunks, 1))
        return (size if size <= block else -(-size // block) * block), num_chunks
    size = -(-tokens // ops.maximum(num_chunks, 1))
    return ops.where(size <= block, size, -(-size // block) * block), num_chunks


class _Order(NamedTuple):
    """The tokens in the order of the loop, the place of each token in it, and how many chunks hold active ones."""

    permutation: Tensor
    inverse: Tensor
    num_active_chunks: Any


def _active_first(is_active, size, num_chunks):
    if is_active is None:
        return _Order(None, None, num_chunks)
    is_active = ops.reshape(is_active, (-1,))  # [N]
    active_so_far = ops.cumsum(ops.cast(is_active, "int32"))
    index = ops.arange(ops.shape(is_active)[0], dtype="int32")
    num_active = ops.sum(ops.cast(is_active, "int32"))
    inverse = ops.where(is_active, active_so_far - 1, num_active + index - active_so_far)
    # All keys are different, so that any sort is a stable one.
    permutation = ops.argsort(inverse)
    size = max(size, 1) if isinstance(size, int) else ops.maximum(size, 1)
    return _Order(permutation, inverse, -(-num_active // size))


def _pad_rows(array, *, permutation, rows):
    """The array in the order of the loop, with rows of 0 at its end; None stays."""
    if array is None:
        return None
    array = array if permutation is None else ops.take(array, permutation, axis=0)
    missing = rows - ops.shape(array)[0]
    if isinstance(missing, int) and missing == 0:
        return array
    return ops.concatenate([array, ops.zeros((missing, array.shape[1]), array.dtype)])


def _scatter_rows(array, *, inverse, tokens, is_active):
    """Rows of the loop back in the order of the tokens, 0 for tokens that are not active."""
    if array is None:
        return None
    array = array[:tokens] if inverse is None else ops.take(array, inverse, axis=0)
    return where_or_zero(array, is_active)
