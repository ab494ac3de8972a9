"""A running sum that goes on counting past 2^24, where a float32 stands still."""

from typing import Any

from keras import ops


class ExactSum:
    """Two float32 variables of a metric whose sum is the running sum, good for 2^48 tokens.

    JAX has no float64 unless asked. What rounding loses of the large part is kept in the small one (Knuth's TwoSum,
    The Art of Computer Programming vol. 2, 4.2.2).
    """

    def __init__(self, metric: Any, name: str) -> None:
        self._high = metric.add_variable((), initializer="zeros", dtype="float32", name=f"{name}_high")
        self._low = metric.add_variable((), initializer="zeros", dtype="float32", name=f"{name}_low")

    def add(self, value: Any) -> None:
        """Adds a scalar."""
        value = ops.cast(value, "float32")
        high, low = ops.convert_to_tensor(self._high), ops.convert_to_tensor(self._low)
        total = high + value
        gone = total - high
        lost = (high - (total - gone)) + (value - gone)
        # An infinite sum has lost nothing worth knowing, and inf - inf would make it NaN.
        lost = ops.where(ops.isfinite(total), lost, ops.zeros_like(lost))
        self._high.assign(total)
        self._low.assign(low + lost)

    def value(self) -> Any:
        """The sum, rounded to float32."""
        return ops.convert_to_tensor(self._high) + ops.convert_to_tensor(self._low)

    def parts(self) -> tuple[float, float]:
        """The two parts, whose exact sum is the sum."""
        return float(ops.convert_to_numpy(self._high)), float(ops.convert_to_numpy(self._low))
