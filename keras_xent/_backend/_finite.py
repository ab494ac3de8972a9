"""Rows without a derivative are kept from spreading NaN to others."""

import functools
from collections.abc import Sequence

from keras import ops

from keras_xent._types import Tensor


def where_finite(residuals: Sequence[Tensor], arrays: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The arrays, 0 in rows whose residuals are not finite: these have no derivative but NaN.

    The upstream gradient is 0 there, and 0 times the NaN derivative of the residuals would leave those rows.
    """
    if not residuals:
        return tuple(arrays)
    finite = functools.reduce(ops.logical_and, map(ops.isfinite, residuals))
    # Arrays of one row are broadcast; a number of rows may not be known of each array.
    rows = finite.shape[0]
    return tuple(a if a.shape[0] == 1 != rows else ops.where(finite, a, ops.zeros((), a.dtype)) for a in arrays)
