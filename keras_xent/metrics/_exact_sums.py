"""Running sums that stay exact past 2^24, where a float32 stops counting."""

from typing import Any

import numpy as np
from keras import ops

from keras_xent._backend import to_numpy


class ExactSums:
    """`number` running sums in two float32 variables of a metric, good for 2^48 tokens.

    JAX has no float64 unless asked. What rounding loses of the large part is kept in the small one (Knuth's TwoSum,
    The Art of Computer Programming vol. 2, 4.2.2).
    """

    def __init__(self, metric: Any, name: str, number: int) -> None:
        self._high, self._low = (
            metric.add_variable((number,), initializer="zeros", dtype="float32", name=f"{name}_{part}")
            for part in ("high", "low")
        )

    def add(self, values: Any) -> None:
        """Adds `[number]` float32 values."""
        high, low = ops.convert_to_tensor(self._high), ops.convert_to_tensor(self._low)
        total = high + values
        gone = total - high
        lost = (high - (total - gone)) + (values - gone)
        # An infinite sum has lost nothing worth knowing, and inf - inf would make it NaN.
        lost = ops.where(ops.isfinite(total), lost, ops.zeros_like(lost))
        self._high.assign(total)
        self._low.assign(low + lost)

    def values(self) -> Any:
        """The sums, rounded to float32."""
        return ops.convert_to_tensor(self._high) + ops.convert_to_tensor(self._low)

    def exact(self) -> np.ndarray:
        """The sums, as float64. Waits for the device."""
        high, low = (to_numpy(part).astype("float64") for part in (self._high, self._low))
        return high + low
