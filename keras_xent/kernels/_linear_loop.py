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
from keras_xent.kernels._exponentials import zero_unused
from keras_xent.kernels._masking import where_or_zero
from keras_xent.kernels._token_chunks import divided, gather_rows, in_order, restored, slice_rows
from keras_xent.kernels._xla_cpu import accumulate_matmul, matmul_over_classes


class Result(NamedTuple):
    """The results of one pass: the columns `[N, K]`, and a gradient of each input, None where not needed."""

    columns: Tensor
    gradients: tuple[Tensor, ...]


class Carry(NamedTuple):
    """The state that the loop carries from chunk to chunk; None for results that are not needed."""

    # One array, so that there is one kernel that writes it, and one that restores its order: each takes memory and time
    # to compile.
    columns: Tensor
    d_hidden: Tensor = None
    d_kernel: Tensor = None
    d_bias: Tensor = None
    d_projected: Tensor = None
    d_factor: Tensor = None

    def present(self) -> dict[str, Any]:
        """The needed results, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class Needs(NamedTuple):
    """Which of the gradients are needed."""

    hidden: bool
    kernel: bool
    bias: bool
    projected: bool
    factor: bool


class Data(NamedTuple):
    """The inputs of a rule beside the logits. None has a gradient."""

    # `[N, 1]`: which tokens count; None if all do. Others have columns and gradients of 0.
    is_active: Tensor
    # Arrays `[N, ...]` such as the labels.
    rows: tuple[Tensor, ...]
    # Arrays that all tokens share, such as class weights.
    constants: tuple[Tensor, ...] = ()


def run(inputs: Any, upstream: Tensor, data: Data, *, group: int | None = None, **static: Any) -> Result:
    """The columns of a rule, and the needed gradients of `sum(upstream * columns)`.

    `inputs` are hidden `[N, D]`, kernel and bias, and of a kernel of low rank that is added to the kernel the hidden
    states projected by one factor `[N, R]` and the other factor (both None without). `upstream` has a column for each
    of the rule's values, or is None where no gradient is needed. Gradients are not yet rounded to 16 bits. With `group`
    a chunk holds whole groups of so many tokens.
    """
    hidden, kernel, bias, projected, factor = inputs
    mesh = _backend.batch_mesh(hidden)
    rows: Any = (hidden, projected, upstream, data.is_active, *data.rows)
    tokens = None
    if mesh is None and group is None:
        rows, tokens = _backend.pad_to_bucket(rows, kernel.shape[0 if static["transpose"] else 1])
        if tokens is not None and data.is_active is None:
            is_active = ops.arange(ops.shape(rows[0])[0], dtype="int32")[:, None] < tokens
            rows = (*rows[:3], is_active, *rows[4:])
    columns, gradients = _run(tuple(rows), (kernel, bias, factor, *data.constants), mesh=mesh, group=group, **static)
    of_rows = [_backend.take_rows(g, tokens) if has_rows else g for g, has_rows in zip(gradients, _ROWS, strict=True)]
    return Result(_backend.take_rows(columns, tokens), tuple(of_rows))


# Which of the gradients have a row for each token.
_ROWS = (True, False, False, True, False)


@CompiledKernel
def _run(rows, replicated, *, mesh, **static):
    on_device = functools.partial(_run_on_device, mesh=mesh, **static)
    return _backend.shard_map_rows(mesh, on_device, rows, replicated, has_rows=(True, _ROWS))


def _run_on_device(rows, replicated, *, mesh, needs_grad, transpose, rule, chunk_bytes, group):
    (hidden, projected, upstream, is_active, arrays), (kernel, bias, factor, constants) = _prepared(
        rows, replicated, rule
    )
    dtype = accumulator_dtype(hidden)
    inputs = (hidden, kernel, bias, projected, factor)
    needs = Needs(
        *(need and x is not None and upstream is not None for need, x in zip(needs_grad, inputs, strict=True))
    )
    tokens, features = ops.shape(hidden)
    num_classes = kernel.shape[0 if transpose else 1]
    chunks = divided(
        tokens,
        is_active,
        group,
        num_classes=num_classes,
        copies=rule.num_logits + (factor is not None),
        chunk_bytes=chunk_bytes,
        needs_kernel=needs.kernel,
        features=features,
        has_large_blocks=rule.has_large_blocks,
    )
    size, is_single = chunks.size, chunks.is_single
    # [chunks.rows, ...], active tokens first.
    hidden, projected, upstream = (in_order(a, chunks) for a in (hidden, projected, upstream))
    if not rule.leaves_rows:
        arrays = [in_order(a, chunks) for a in arrays]

    def rows_of_chunk(start):
        if not rule.leaves_rows:
            return [slice_rows(a, start, size) for a in arrays]
        pieces = [gather_rows(a, chunks, start) for a in arrays]
        active = None if is_active is None else gather_rows(is_active, chunks, start)
        return [where_or_zero(a, active) if is_float(a) else a for a in pieces]

    def body(i, carry):
        start = i * size if chunks.starts is None else chunks.starts[i]
        chunk, low, d_columns = (slice_rows(a, start, size) for a in (hidden, projected, upstream))
        if chunks.starts is not None:
            # What is left of a group that does not fit comes again in the next chunk, with the rest of it.
            is_whole = ops.arange(size, dtype="int32")[:, None] < chunks.starts[i + 1] - start
            d_columns = where_or_zero(d_columns, is_whole)
        logits = matmul(chunk, kernel, transpose_b=transpose)  # [size, V]
        if factor is not None:
            logits = logits + matmul(low, factor, transpose_b=transpose)
        if bias is not None:
            logits = logits + ops.cast(bias, dtype)
        arrays_of_chunk = rule.arrays(rows_of_chunk(start), constants)
        columns, d_logits = rule.of_chunk(d_columns, logits, arrays_of_chunk, constants)
        carry = carry._replace(columns=update_rows(carry.columns, start, ops.concatenate(columns, axis=1)))
        if upstream is None:
            return carry
        if is_single and is_active is not None and d_logits.factors is not None:
            # Several chunks are left out where no token is active; a single one is computed, from a kernel of NaN too.
            d_logits = zero_unused(d_logits, columns)
        d_logits = d_logits._replace(matrix=ops.cast(d_logits.matrix, kernel.dtype))
        return _add_gradients(carry, start, d_logits, (chunk, kernel, low, factor), needs, transpose)

    def zeros(needed, *shape):
        # TensorFlow would make a constant of them, and copies of that while it compiles: 6 of 2 MB.
        return ops.broadcast_to(_backend.opaque(ops.zeros((), dtype)), shape) if needed else None

    carry = Carry(
        columns=ops.zeros((chunks.rows, rule.num_columns), dtype),
        # Of each row that is kept the loop writes the gradient, whatever it begins with: zeros are a kernel to compile.
        d_hidden=ops.cast(hidden, dtype) if needs.hidden else None,
        # With one chunk the product is the gradient.
        d_kernel=zeros(needs.kernel and not is_single, *kernel.shape),
        d_bias=zeros(needs.bias, num_classes),
        d_projected=ops.cast(projected, dtype) if needs.projected else None,
        d_factor=None if not needs.factor or is_single else ops.zeros(factor.shape, dtype),
    )
    if is_single:
        carry = body(0, carry)
    else:
        # Devices that share the classes go through the loop together, and all wait for the last at its end.
        steps = chunks.steps if chunks.permutation is None else _backend.pmax(mesh, chunks.steps)
        # TensorFlow's loop carries no None.
        carry = Carry(**fori_loop(steps, lambda i, state: body(i, Carry(**state)).present(), carry.present()))
    restore = functools.partial(restored, chunks=chunks, tokens=tokens, is_active=is_active)
    gradients = (
        restore(carry.d_hidden),
        _backend.psum(mesh, carry.d_kernel),
        _backend.psum(mesh, carry.d_bias),
        restore(carry.d_projected),
        _backend.psum(mesh, carry.d_factor),
    )
    return restore(carry.columns), gradients


def _prepared(rows, replicated, rule):
    """The arrays in the dtypes that they are multiplied in, 0 for inactive tokens."""
    hidden, projected, upstream, is_active, *arrays = rows
    kernel, bias, factor, *constants = replicated
    if not on_accelerator():
        # A CPU multiplies 16-bit floats by way of float32 in any case.
        hidden = ops.cast(hidden, accumulator_dtype(hidden))
    kernel = ops.cast(kernel, hidden.dtype)
    arrays, constants = rule.prepare(arrays, constants)
    # Inactive tokens may hold NaN, and 0 * NaN would make the kernel's gradient NaN.
    hidden = where_or_zero(hidden, is_active)
    if factor is not None:
        projected, factor = where_or_zero(ops.cast(projected, hidden.dtype), is_active), ops.cast(factor, hidden.dtype)
    upstream = None if upstream is None else where_or_zero(upstream, is_active)
    if not rule.leaves_rows:
        arrays = [where_or_zero(a, is_active) if is_float(a) else a for a in arrays]
    return (hidden, projected, upstream, is_active, arrays), (kernel, bias, factor, constants)


def _add_gradients(carry, start, gradient, factors_of_logits, needs, transpose):
    """The state with the gradients of a chunk that begins at `start`, of whose logits `gradient` is that.

    `factors_of_logits` are what the logits are products of: hidden states `[size, D]` and kernel, and of low rank
    projected ones `[size, R]` and the other factor.
    """
    chunk, kernel, low, factor = factors_of_logits
    d_chunk = None
    if needs.hidden:
        d_chunk = _hidden_gradient(gradient, kernel, transpose)  # [size, D]
        carry = carry._replace(d_hidden=update_rows(carry.d_hidden, start, d_chunk))
    if not any(needs._replace(hidden=False)):
        return carry
    d_logits = gradient.whole(read_before=d_chunk)
    if needs.projected:
        d_low = gradient.scaled(matmul(d_logits, factor, transpose_b=not transpose))  # [size, R]
        carry = carry._replace(d_projected=update_rows(carry.d_projected, start, d_low))
    if needs.kernel:
        rows = gradient.scaled(chunk)
        # A product whose left factor is transposed is slow on XLA:CPU.
        is_slow = not transpose and uses_xla_cpu()
        rows_t = _backend.opaque(ops.transpose(rows)) if is_slow else None  # [D, size]
        carry = carry._replace(d_kernel=_add_product(carry.d_kernel, rows, d_logits, transpose, rows_t))
    if needs.factor:
        carry = carry._replace(d_factor=_add_product(carry.d_factor, gradient.scaled(low), d_logits, transpose))
    if needs.bias:
        d_bias = ops.sum(gradient.scaled(ops.cast(d_logits, carry.d_bias.dtype)), axis=0)
        carry = carry._replace(d_bias=carry.d_bias + d_bias)
    return carry


def _hidden_gradient(gradient, kernel, transpose):
    """The gradient for the hidden states: that of the logits times the transposed kernel."""
    product = matmul_over_classes(gradient.matrix, kernel, transpose=not transpose)  # [size, D]
    if gradient.labels is not None:
        of_labels = ops.take(kernel, gradient.labels[:, 0], axis=0 if transpose else 1)
        product = product + gradient.at_label * (of_labels if transpose else ops.transpose(of_labels))
    return gradient.scaled(product)


def _add_product(total, rows, d_logits, transpose, rows_t=None):
    """`total + transpose(rows) @ d_logits` `[D, V]`, or the transpose of that; `rows_t` may hold `transpose(rows)`."""

    def product(d_logits):
        if transpose:
            return matmul(d_logits, rows, transpose_a=True)  # [V, D]
        if rows_t is None:
            return matmul(rows, d_logits, transpose_a=True)  # [D, V]
        return matmul(rows_t, d_logits)  # [D, V]

    return accumulate_matmul(total, product, d_logits, classes_first=transpose)
