"""Numbers of rows rounded up to a bucket, with JAX (`_buckets.py` has the reason)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from keras_xent._backend._buckets import bucket_of, pad_those_with_rows, row_size_of
from keras_xent._backend._xla import uses_xla
from keras_xent._types import Tensor


def pad_to_bucket(arrays: Sequence[Tensor], row_size: int | None = None) -> tuple[Any, Any]:
    """The arrays with rows of zeros added up to the next bucket, and how many rows they had; None where none is added.

    `row_size` is how many numbers the program makes of one row, if these are not the rows of the first array. Nothing
    is added inside a program, where shapes are what they are, nor to arrays that are sharded.
    """
    first = arrays[0]
    if not uses_xla() or any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(arrays)):
        return arrays, None
    num_rows = first.shape[0]
    bucket = bucket_of(num_rows, row_size or row_size_of(first.shape))
    if bucket == num_rows or any(len(a.devices()) > 1 for a in jax.tree.leaves(arrays) if isinstance(a, jax.Array)):
        return arrays, None
    return jax.tree.map(lambda a: append_zeros(a, bucket - num_rows), arrays), num_rows


def append_zeros(array: Tensor, missing: int) -> Tensor:
    """The array with rows of zeros after its own."""
    if isinstance(array, jax.core.Tracer):
        return jax.numpy.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
    # By NumPy, which reads an array on the CPU where it is: JAX would compile a program to append so many rows.
    array = np.asarray(array)
    return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])


def take_rows(tree: Any, num_rows: int | None) -> Any:
    """The first rows of each array; all of them for None."""
    return tree if num_rows is None else jax.tree.map(lambda a: _take_rows(a, num_rows), tree)


def _take_rows(array, num_rows):
    if isinstance(array, jax.core.Tracer):
        return array[:num_rows]
    return jax.numpy.asarray(np.asarray(array)[:num_rows])


def with_rounded_rows(program: Callable, has_rows: Sequence[bool]) -> Callable:
    """`program`, run on rows that are rounded up to a bucket; its result loses the rows that were added.

    `has_rows` says which arguments have rows.
    """

    def rounded(*inputs: Tensor, **options: Any) -> Any:
        padded, num_rows = pad_inputs(inputs, has_rows)
        return take_rows(program(*padded, **options), num_rows)

    return rounded


# Of those inputs that have rows: `pad_inputs(inputs, has_rows)`.
pad_inputs = functools.partial(pad_those_with_rows, pad_to_bucket)
