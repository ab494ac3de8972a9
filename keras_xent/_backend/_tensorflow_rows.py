"""Numbers of rows rounded up to a bucket, with TensorFlow (`_buckets.py` has the reason)."""

import contextvars
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_xent._backend._buckets import bucket_of, buckets, pad_those_with_rows, row_size_of
from keras_xent._backend._tensorflow_graph import in_xla
from keras_xent._backend._xla import uses_xla
from keras_xent._types import Tensor

# Whether this is inside a program whose rows have been rounded up.
_is_rounded = contextvars.ContextVar("_is_rounded", default=False)


def pad_to_bucket(arrays: Sequence[Tensor], row_size: int | None = None) -> tuple[Any, Any]:
    """The arrays with rows of zeros added up to the next bucket, and how many rows they had; None where none is added.

    `row_size` is how many numbers the program makes of one row, if these are not the rows of the first array. Nothing
    is added inside a program of XLA, where shapes are what they are, and in a graph to a number of rows that is known:
    the graph itself is for that number.
    """
    first = arrays[0]
    if not uses_xla() or _is_rounded.get() or in_xla():
        return arrays, None
    row_size = row_size or row_size_of(first.shape)
    known = first.shape[0]
    if known is None:
        num_rows, missing = _rows_and_missing(first, row_size)
    elif tf.executing_eagerly() and known != bucket_of(known, row_size):
        num_rows, missing = known, bucket_of(known, row_size) - known
    else:
        return arrays, None
    # By the rank of the array: how many zeros go before and after each axis.
    paddings = {rank: missing * _at_the_end(rank) for rank in {len(a.shape) for a in arrays if a is not None}}
    padded = [None if a is None else tf.raw_ops.Pad(input=a, paddings=paddings[len(a.shape)]) for a in arrays]
    if known is None:
        for new, old in zip(padded, arrays, strict=True):
            if new is not None:
                new.set_shape((None, *old.shape[1:]))
    return padded, num_rows


@functools.cache
def _at_the_end(rank):
    return np.array([[0, 1], *[[0, 0]] * (rank - 1)], "int32")


def append_rows(array: Tensor, like: Tensor) -> Tensor:
    """The array with rows of zeros after its own, as many as `like` has."""
    return tf.raw_ops.Pad(input=array, paddings=(like.shape[0] - array.shape[0]) * _at_the_end(len(array.shape)))


# Of those inputs that have rows: `pad_inputs(inputs, has_rows)`.
pad_inputs = functools.partial(pad_those_with_rows, pad_to_bucket)


def _rows_and_missing(array, row_size):
    """The number of rows, and how many are missing to the bucket, both `[1]`: in few operations, all LiteRT's too."""
    table = tf.constant(buckets(row_size), "int32")
    num_rows = tf.shape(array)[:1]
    place = tf.reduce_sum(tf.cast(table < num_rows, "int32"), axis=0, keepdims=True)
    return num_rows, tf.raw_ops.Gather(params=table, indices=place) - num_rows


def with_rounded_rows(program: Callable, has_rows: Sequence[bool]) -> Callable:
    """`program`, run on rows that are rounded up to a bucket; its result loses the rows that were added.

    `has_rows` says which arguments have rows.
    """

    def rounded(*inputs: Tensor, **options: Any) -> Any:
        padded, num_rows = pad_inputs(inputs, has_rows)
        if num_rows is None:
            return program(*padded, **options)
        token = _is_rounded.set(True)
        try:
            return take_rows(program(*padded, **options), num_rows)
        finally:
            _is_rounded.reset(token)

    return rounded


def take_rows(tree: Any, num_rows: Any) -> Any:
    """The first rows of each array; all of them for None."""
    if num_rows is None:
        return tree
    end = [num_rows] if isinstance(num_rows, int) else num_rows
    if isinstance(tree, (tuple, list)):
        return tuple(take_rows(a, num_rows) for a in tree)
    return None if tree is None else tf.strided_slice(tree, [0], end)
