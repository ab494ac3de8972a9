"""One pass over the tokens of a linear cross-entropy, in chunks.

For each chunk the logits are computed, and the bodies of the sparse softmax kernel turn them into losses and, in the
same memory, into their gradient, which two more matmuls turn into gradients for the hidden states and for the kernel.
So what exists at once is one chunk of logits.

Tokens that are not active (masked, ignored, of weight 0) are moved to the end, and the loop ends before them.
"""

import functools
from typing import Any, NamedTuple

from keras import ops

from keras_xent import _backend
from keras_xent._backend import fori_loop, matmul, on_accelerator, update_rows, uses_xla_cpu
from keras_xent._types import Tensor
from keras_xent.kernels import _softmax_row as row
from keras_xent.kernels import sparse_softmax
from keras_xent.kernels._compiled import CompiledKernel
from keras_xent.kernels._dtypes import accumulator_dtype, upcast
from keras_xent.kernels._masking import where_or_zero
from keras_xent.kernels._xla_cpu import accumulate_matmul, block_size, map_row_blocks

# Bytes of one chunk of logits, and its fewest tokens: each chunk adds once to the kernel's gradient, which has to cost
# little beside the matmuls of its tokens (docs/performance.md).
CPU_CHUNK_BYTES = 2**26
ACCELERATOR_CHUNK_BYTES = 2**29
MIN_CHUNK_TOKENS = 512
# Tokens that are not active are left out by whole chunks: where there may be some, there should be a few chunks.
MIN_CHUNKS_IF_MASKED = 4


class Result(NamedTuple):
    """What one pass gives: arrays `[N, 1]`, and gradients of hidden, kernel and bias, None where not needed."""

    losses: Tensor
    nll: Tensor
    rank: Tensor
    gradients: tuple[Tensor, Tensor, Tensor]


class Carry(NamedTuple):
    """What the loop carries from chunk to chunk; None for what is not needed."""

    losses: Tensor
    nll: Tensor
    rank: Tensor = None
    d_hidden: Tensor = None
    d_kernel: Tensor = None
    d_bias: Tensor = None

    def present(self) -> dict[str, Tensor]:
        """What is needed, by name."""
        return {name: array for name, array in self._asdict().items() if array is not None}


def run(inputs: Any, upstream: Tensor, nondiff_args: Any, **static: Any) -> Result:
    """Losses, their statistics, and the needed gradients of `sum(upstream * losses)`.

    `inputs` are hidden `[N, D]`, kernel and bias; `upstream` is `[N, 1]`, or None where no gradient is needed;
    `nondiff_args` are labels `[N, 1]`, class weights `[1, V]` and `is_active` `[N, 1]`. Tokens that are not active have
    loss and gradient 0. Gradients are not yet rounded to 16 bits.
    """
    hidden, kernel, bias = inputs
    labels, class_weights, is_active = nondiff_args
    mesh = _backend.batch_mesh(hidden)
    rows: Any = (hidden, upstream, labels, is_active)
    tokens = None
    if mesh is None:
        rows, tokens = _backend.pad_to_bucket(rows, kernel.shape[0 if static["transpose"] else 1])
        if tokens is not None and is_active is None:
            rows = (*rows[:3], ops.arange(ops.shape(rows[0])[0], dtype="int32")[:, None] < tokens)
    losses, nll, rank, gradients = _run(tuple(rows), (kernel, bias, class_weights), mesh=mesh, **static)
    losses, nll, rank, d_hidden = _backend.take_rows((losses, nll, rank, gradients[0]), tokens)
    return Result(losses, nll, rank, (d_hidden, *gradients[1:]))


@CompiledKernel
def _run(rows, replicated, *, mesh, **static):
    has_rows = (True, True, True, (True, False, False))
    on_device = functools.partial(_run_on_device, mesh=mesh, **static)
    return _backend.shard_map_rows(mesh, on_device, rows, replicated, has_rows=has_rows)


def _run_on_device(rows, replicated, *, mesh, needs_grad, transpose, ranks, options):
    hidden, upstream, labels, is_active = rows
    kernel, bias, class_weights = replicated
    dtype = accumulator_dtype(hidden)
    if not on_accelerator():
        # A CPU multiplies 16-bit floats by way of float32 in any case.
        hidden = ops.cast(hidden, dtype)
    kernel = ops.cast(kernel, hidden.dtype)
    # What is not active may hold NaN, which 0 times it would bring into the kernel's gradient.
    hidden = where_or_zero(hidden, is_active)
    upstream = None if upstream is None else where_or_zero(upstream, is_active)
    tokens, features = ops.shape(hidden)
    size, num_chunks = _chunk_sizes(tokens, kernel.shape[0 if transpose else 1], is_masked=is_active is not None)
    is_single = isinstance(num_chunks, int) and num_chunks == 1
    order = _active_first(None if is_single else is_active, size, num_chunks)
    # Devices that share the classes go through the loop together, and all wait for the last at its end.
    steps = num_chunks if order.permutation is None else _backend.pmax(mesh, order.num_active_chunks)
    hidden, labels, upstream = (
        None if a is None else _pad_rows(_gather_rows(a, order.permutation), size * num_chunks)
        for a in (hidden, labels, upstream)
    )  # [size * num_chunks, D or 1], active tokens first
    needs_hidden, needs_kernel, needs_bias = needs_grad if upstream is not None else (False,) * 3
    needs_bias = needs_bias and bias is not None
    # A product whose left factor is transposed is slow on XLA:CPU: transposed once, for all chunks.
    hidden_t = ops.transpose(hidden) if needs_kernel and not transpose and uses_xla_cpu() else None  # [D, tokens]

    gradient_of_chunk = functools.partial(
        _losses_and_logits_gradient, class_weights=class_weights, ranks=ranks, options=options
    )

    def body(i, carry):
        start = i * size
        chunk, *columns = (
            ops.slice(a, (start, 0), (size, a.shape[1])) for a in (hidden, labels, upstream) if a is not None
        )  # [size, D], [size, 1], [size, 1]
        logits = matmul(chunk, kernel, transpose_b=transpose)  # [size, V]
        if bias is not None:
            logits = logits + ops.cast(bias, dtype)
        outputs = gradient_of_chunk(logits, *columns)
        d_logits, losses, nll, *rank = outputs if upstream is not None else (None, *outputs)
        carry = carry._replace(
            losses=update_rows(carry.losses, start, losses),
            nll=update_rows(carry.nll, start, nll),
            rank=update_rows(carry.rank, start, rank[0]) if ranks else None,
        )
        if upstream is None:
            return carry
        d_logits = ops.cast(d_logits, chunk.dtype)
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

    def column():
        return ops.zeros((size * num_chunks, 1), dtype)

    carry = Carry(
        losses=column(),
        nll=column(),
        rank=column() if ranks else None,
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
    return restore(carry.losses), restore(carry.nll), restore(carry.rank), gradients


def _chunk_sizes(tokens, num_classes, *, is_masked):
    """Tokens of a chunk, and the number of chunks: as even as they can be, and a whole number of blocks each."""
    budget = ACCELERATOR_CHUNK_BYTES if on_accelerator() else CPU_CHUNK_BYTES
    block = block_size((1, num_classes))
    most = max(MIN_CHUNK_TOKENS, budget // (4 * num_classes))
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


def _gather_rows(array, permutation):
    return array if permutation is None else ops.take(array, permutation, axis=0)


def _pad_rows(array, rows):
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


def _losses_and_logits_gradient(logits, labels, upstream=None, *, class_weights, ranks, options):
    """Losses, nll and rank of a chunk; with `upstream`, before these the gradient, in the memory of the logits."""

    def on_block(logits, labels, *upstream):
        losses, residuals = sparse_softmax.forward(logits, labels, class_weights, options=options)
        label = ops.maximum(labels, 0)
        label_logit = upcast(ops.take_along_axis(logits, label, axis=1))
        nll = row.nll(label_logit, *residuals, options.logit_softcap)
        statistics = (losses, nll, *([row.rank_of_label(logits, labels)] if ranks else []))
        if not upstream:
            return statistics
        # The gradient takes the memory of the logits. XLA:CPU would copy them for a reader that it does not wait for.
        (d_losses,) = upstream
        for read in (losses, *statistics[2:]):
            d_losses = _add_dependency(d_losses, read)
        shifted = None
        if uses_xla_cpu():
            # The terms of the sum in `forward`, which XLA:CPU has written to memory. Writing the gradient to its place
            # runs on one thread, and should not compute exponentials.
            softcap = options.logit_softcap
            ids, max_logit = row.class_ids(logits), residuals[0]
            shifted = sparse_softmax.exp_shifted_except_label(logits, ids, label, max_logit, softcap)
        d_logits = sparse_softmax.backward(d_losses, residuals, logits, labels, class_weights, shifted, options=options)
        return d_logits, *statistics

    arrays = (logits, labels) if upstream is None else (logits, labels, upstream)
    if not uses_xla_cpu():
        return on_block(*arrays)
    num_outputs = len(arrays) + bool(ranks)
    columns = (ops.zeros_like(logits[:, :1]),) * num_outputs
    return map_row_blocks(on_block, arrays, columns, in_place=upstream is not None)


def _add_dependency(value, other):
    """`value`, made to depend on the other in a way that XLA does not see through."""
    return value + 0.0 * where_or_zero(other, ops.isfinite(other))
