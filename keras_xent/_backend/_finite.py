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
    return tuple(ops.where(finite, a, ops.zeros((), a.dtype)) if a.shape[0] == finite.shape[0] else a for a in arrays)
