"""The tokens of a linear kernel, divided into chunks: how many to a chunk, in which order, and back again."""

from typing import Any, NamedTuple

from keras import ops

from keras_xent._backend import fori_loop, on_accelerator, update_rows
from keras_xent._types import Tensor
from keras_xent.kernels._masking import where_or_zero
from keras_xent.kernels._xla_cpu import block_size

# Bytes of one chunk of logits, at most, and its fewest tokens: each chunk adds once to the kernel's gradient, which has
# to cost little beside the matmuls of its tokens (docs/performance.md).
CPU_CHUNK_BYTES = 2**26
ACCELERATOR_CHUNK_BYTES = 2**29
MIN_CHUNK_TOKENS = 512
# The same where the gradient of the kernel is not computed: each chunk reads the kernel once.
MIN_CHUNK_TOKENS_WITHOUT_KERNEL = 128
# An accelerator multiplies so fast that adding needs more tokens: on an H100, the head of Llama 3 takes 32.6, 24.9 and
# 22.7 ms in chunks of 512, 1024 and 2048. Of no more tokens than features the logits need no more memory than the
# gradient of the kernel. So the number of features, within these limits.
ACCELERATOR_MIN_CHUNK_TOKENS = 1024, 2048
# Of few tokens a chunk is a share, so that what it takes stays small beside the logits it saves and the gradient of the
# kernel: of fewer than `FEW_TOKENS` a quarter of that gradient, which is a quarter of the features in tokens, unless
# a quarter of the bytes above holds more.
FEW_TOKENS = 4096
MIN_CHUNKS, MIN_CHUNKS_OF_FEW = 8, 32
# On an accelerator, whose chunks have more tokens, the share of any number of tokens.
ACCELERATOR_MIN_CHUNKS = 4
SMALL_SHARE = 4
# Chunks of fewer large blocks are not made larger to hold a whole number of these.
MIN_LARGE_BLOCKS = 16
# Tokens that are not active are left out by whole chunks: where there may be some, there should be a few chunks.
MIN_CHUNKS_IF_MASKED = 4
# Groups with masked tokens fill chunks unevenly: with fewer groups to a chunk, what it leaves empty costs more than the
# matmul that is saved.
MIN_GROUPS_IF_MASKED = 2


def chunk_sizes(
    tokens: Any,
    num_classes: int,
    *,
    is_masked: bool,
    copies: int = 1,
    chunk_bytes: int | None = None,
    needs_kernel: bool = True,
    features: int = 1,
    has_large_blocks: bool = False,
) -> tuple[Any, Any]:
    """Tokens of a chunk, and the number of chunks: as even as they can be, and a whole number of blocks each.

    `copies` arrays of the size of the logits exist at once. With `chunk_bytes` a chunk takes no more, unless one token
    does. `features` are those of the kernel.
    """
    budget = chunk_bytes or (ACCELERATOR_CHUNK_BYTES if on_accelerator() else CPU_CHUNK_BYTES)
    bytes_of_token = 4 * num_classes * copies
    block = block_size((1, num_classes))
    fewest = _fewest_tokens(features, needs_kernel)
    most = max(1 if chunk_bytes else fewest, budget // bytes_of_token)
    block = min(block, most)
    if isinstance(tokens, int):
        least = _fewest_tokens(features, True)
        half = max(1, least // 2)
        if is_masked:
            most = min(most, max(half, -(-tokens // MIN_CHUNKS_IF_MASKED)))
        if not chunk_bytes:
            share = _share(tokens, features if needs_kernel else SMALL_SHARE * half, least)
            most = min(most, max(share, budget // SMALL_SHARE // bytes_of_token))
    if not (isinstance(tokens, int) or ops.is_tensor(tokens)):
        # A symbolic size, as `jax.export` has it: chunks are slices of a fixed size.
        size = most // block * block
        return size, -(-tokens // size)
    num_chunks = -(-tokens // most)
    size = _rounded_up(-(-tokens // _maximum(num_chunks, 1)), block, block)
    if has_large_blocks:
        large = block_size((1, num_classes), is_large=True)
        size = _rounded_up(size, large, MIN_LARGE_BLOCKS * large)
    return size, num_chunks


def holds_groups(
    groups: int | None, group: int, num_classes: int, *, is_masked: bool, features: int, chunk_bytes: int | None = None
) -> bool:
    """Whether a chunk may be of whole groups of so many tokens: as large as any chunk, or a share of all tokens.

    `groups` is their number, if it is known.
    """
    budget = chunk_bytes or (ACCELERATOR_CHUNK_BYTES if on_accelerator() else CPU_CHUNK_BYTES)
    most = budget // (4 * num_classes)
    if not chunk_bytes:
        share = groups * group // MIN_CHUNKS if isinstance(groups, int) else 0
        most = max(most, share, _fewest_tokens(features, True))
    return group * _fewest_groups(is_masked) <= most


def in_whole_groups(size: Any, tokens: Any, group: int, *, is_masked: bool) -> tuple[Any, Any]:
    """The tokens of a chunk, made a whole number of groups, and the number of chunks if all tokens are active."""
    size = _maximum(size // group * group, group * _fewest_groups(is_masked))
    return size, -(-tokens // size)


def _fewest_groups(is_masked):
    return MIN_GROUPS_IF_MASKED if is_masked else 1


def _maximum(size, least):
    return max(size, least) if isinstance(size, int) else ops.maximum(size, least)


def _rounded_up(size, multiple, least):
    """The size, rounded up to a multiple if it is larger than `least`."""
    rounded = -(-size // multiple) * multiple
    return ops.where(size > least, rounded, size) if ops.is_tensor(size) else rounded if size > least else size


def _fewest_tokens(features, needs_kernel):
    if on_accelerator():
        least, most = ACCELERATOR_MIN_CHUNK_TOKENS
        return min(max(features, least), most) if needs_kernel else MIN_CHUNK_TOKENS
    return MIN_CHUNK_TOKENS if needs_kernel else min(MIN_CHUNK_TOKENS, MIN_CHUNK_TOKENS_WITHOUT_KERNEL)


def _share(tokens, features, least):
    if on_accelerator():
        return max(least, -(-tokens // ACCELERATOR_MIN_CHUNKS))
    half = max(1, least // 2)
    if tokens >= FEW_TOKENS:
        return max(half, -(-tokens // MIN_CHUNKS))
    return max(-(-tokens // MIN_CHUNKS_OF_FEW), min(half, features // SMALL_SHARE))


class Chunks(NamedTuple):
    """How the loop goes through the tokens."""

    # Tokens of a chunk, how many chunks hold active ones, and the rows of arrays in the order of the loop.
    size: Any
    steps: Any
    rows: Any
    # The tokens in the order of the loop, and the place of each token in it; None: as they are.
    permutation: Tensor = None
    inverse: Tensor = None
    # Where chunks of whole groups begin, if not at multiples of the size.
    starts: Tensor = None
    # Whether there is one chunk, of all tokens as they are.
    is_single: bool = False


def divided(tokens: Any, is_active: Tensor, group: int | None, *, num_classes: int, **sizes: Any) -> Chunks:
    """The tokens, active ones first, in chunks of these `sizes` (see `chunk_sizes`).

    `is_active` `[N, 1]` is None if all are. With `group` a chunk holds whole groups of so many tokens.
    """
    is_masked = is_active is not None
    size, num_chunks = chunk_sizes(tokens, num_classes, is_masked=is_masked, **sizes)
    if group is not None:
        size, num_chunks = in_whole_groups(size, tokens, group, is_masked=is_masked)
    rows = size * num_chunks
    is_single = isinstance(num_chunks, int) and num_chunks == 1
    if is_single or not is_masked:
        return Chunks(size, num_chunks, rows, is_single=is_single)
    is_active = ops.reshape(is_active, (-1,))
    permutation, inverse = _active_first(is_active)
    if group is None:
        num_active = ops.sum(ops.cast(is_active, "int32"))
        return Chunks(size, -(-num_active // _maximum(size, 1)), rows, permutation, inverse)
    starts, steps = group_starts(is_active, group, size, num_chunks)
    # The last chunk begins where the last group does.
    return Chunks(size, steps, rows + size, permutation, inverse, starts)


def _active_first(is_active):
    """The order that has the active tokens `[N]` first, and its inverse."""
    index = ops.arange(ops.shape(is_active)[0], dtype="int32")
    # All keys are different, so that any sort is a stable one. A cumulative sum would give the inverse without a second
    # one, and makes a larger program.
    permutation = ops.argsort(ops.where(is_active, -(2**31) + index, index))
    return permutation, ops.argsort(permutation)


def group_starts(is_active: Tensor, group: int, size: Any, num_chunks: Any) -> tuple[Tensor, Any]:
    """Where chunks of whole groups begin, among the active tokens in order, and how many chunks hold any."""
    active = ops.sum(ops.cast(ops.reshape(is_active, (-1, group)), "int32"), axis=1)
    ends = ops.cumsum(active)  # [groups]
    # Two chunks in a row hold more than `size` tokens.
    starts = ops.zeros((2 * num_chunks + 1,), "int32")

    def next_start(i, starts):
        last = ops.max(ops.where(ends <= starts[i] + size, ends, 0), keepdims=True)
        return update_rows(starts, i + 1, last)

    starts = fori_loop(2 * num_chunks, next_start, starts)
    return starts, ops.sum(ops.cast(starts < ends[-1], "int32"))


def in_order(array: Tensor, chunks: Chunks) -> Tensor:
    """The array in the order of the loop, with rows of 0 at its end; None stays."""
    if array is None:
        return None
    array = array if chunks.permutation is None else ops.take(array, chunks.permutation, axis=0)
    missing = chunks.rows - ops.shape(array)[0]
    if isinstance(missing, int) and missing == 0:
        return array
    return ops.concatenate([array, ops.zeros((missing, array.shape[1]), array.dtype)])


def restored(array: Tensor, chunks: Chunks, tokens: Any, is_active: Tensor) -> Tensor:
    """Rows of the loop back in the order of the tokens, 0 for tokens that are not active; None stays."""
    if array is None:
        return None
    array = array[:tokens] if chunks.inverse is None else ops.take(array, chunks.inverse, axis=0)
    return where_or_zero(array, is_active)


def slice_rows(array: Tensor, start: Any, size: Any) -> Tensor:
    """The rows of a chunk; None stays."""
    return None if array is None else ops.slice(array, (start, 0), (size, array.shape[1]))


def gather_rows(array: Tensor, chunks: Chunks, start: Any) -> Tensor:
    """The rows of a chunk, of an array in the order of the tokens, of which no copy in another order is made.

    Beyond the last token rows repeat: their gradient is 0, and what is computed of them is dropped.
    """
    indices = ops.minimum(start + ops.arange(chunks.size, dtype="int32"), ops.shape(array)[0] - 1)
    if chunks.permutation is not None:
        indices = ops.take(chunks.permutation, indices)
    return ops.take(array, indices, axis=0)
