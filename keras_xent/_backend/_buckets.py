"""For which numbers of rows programs are compiled where the number may be a new one in every call.

Each shape needs a program of its own, and a program takes as long to compile as thousands of batches to run. So the
number of rows is rounded up to one of few *buckets*: four in each octave, so that at most a quarter is computed in
vain, and a smallest one whose rows a program reads in a fraction of a millisecond. The rows that are added hold zeros:
a label of class 0, a mask of False, an upstream gradient of 0; nothing of them is returned.
"""

import contextvars
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from keras_xent._types import Shape, Tensor

_SMALLEST_BYTES = 2**20
_SMALLEST_ROWS = 512
_MOST_ROWS = 2**31 - 1
# Where one trace serves many numbers of rows, one of these: what a program is made of depends on how many they are.
example_rows: contextvars.ContextVar[int | None] = contextvars.ContextVar("example_rows", default=None)


@functools.cache
def buckets(row_size: int | None) -> tuple[int, ...]:
    """The numbers of rows for which there are programs, for rows of so many numbers (None: not known)."""
    smallest = 1 if row_size is None else max(1, min(_SMALLEST_ROWS, _SMALLEST_BYTES // (4 * max(row_size, 1))))
    steps = [1, 2, 3, *(k << octave for octave in range(29) for k in (4, 5, 6, 7))]
    return tuple(n for n in steps if smallest <= n <= _MOST_ROWS)


def bucket_of(num_rows: int, row_size: int | None) -> int:
    """The smallest bucket that so many rows fit into."""
    return next((n for n in buckets(row_size) if n >= num_rows), num_rows)


def row_size_of(shape: Shape) -> int | None:
    """Returns the number of elements of one row; None if that is not known."""
    return None if None in shape[1:] else math.prod(size or 0 for size in shape[1:])


def rows_of(array: Tensor) -> int | None:
    """The number of rows of an array, or one like it, if it is known."""
    known = array.shape[0]
    return example_rows.get() if known is None else known


def pad_those_with_rows(
    pad_to_bucket: Callable, inputs: Sequence[Tensor], has_rows: Sequence[bool]
) -> tuple[Sequence[Tensor], Any]:
    """The inputs, those that have rows padded by `pad_to_bucket`, and how many rows they had; None if none is added."""
    if not any(has_rows):
        return inputs, None
    padded, num_rows = pad_to_bucket([i for i, has in zip(inputs, has_rows, strict=False) if has])
    if num_rows is None:
        return inputs, None
    rows = iter(padded)
    return tuple(next(rows) if has else i for i, has in zip(inputs, has_rows, strict=False)), num_rows
