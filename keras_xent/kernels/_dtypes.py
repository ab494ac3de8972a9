"""Dtypes of tensors, the same on every backend."""

import numpy as np
from keras import ops

from keras_xent import arguments
from keras_xent._backend import snapshot, widest_int
from keras_xent._types import Tensor


def dtype_of(tensor: Tensor) -> str:
    """The name of a tensor's dtype."""
    return str(getattr(tensor.dtype, "name", tensor.dtype))


def is_float(tensor: Tensor) -> bool:
    """Returns whether the tensor's dtype is a float type, bfloat16 included."""
    return "float" in dtype_of(tensor)


def narrow_float(tensor: Tensor) -> str:
    """The name of the tensor's dtype if it is a 16-bit float, else the empty string."""
    name = dtype_of(tensor)
    return name if name in ("bfloat16", "float16") else ""


def accumulator_dtype(tensor: Tensor) -> str:
    """The dtype in which sums are computed: float64 for float64 tensors, float32 for all others."""
    return "float64" if dtype_of(tensor) == "float64" else "float32"


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in its accumulator dtype."""
    return ops.cast(tensor, accumulator_dtype(tensor))


def largest(tensor: Tensor) -> float:
    """The largest finite number of the tensor's dtype (float32 or float64)."""
    return float(np.finfo(dtype_of(tensor)).max)


def smallest_normal(tensor: Tensor) -> float:
    """The smallest positive number of the tensor's dtype (float32 or float64) that is not rounded to 0."""
    return float(np.finfo(dtype_of(tensor)).tiny)


def is_finite(tensor: Tensor) -> Tensor:
    """True for numbers, False for infinities and NaN; of float32 and float64.

    Not `ops.isfinite`: TensorFlow's XLA (2.21) takes 7 ms longer to compile a program for each such operation in it,
    which it translates by way of MLIR, and likewise for isinf, abs and exp.
    """
    return ops.logical_and(tensor <= largest(tensor), tensor >= -largest(tensor))


def to_tensor(value: Tensor, argument: str | None = None) -> Tensor:
    """A tensor of the value's own dtype; a variable is read, a list becomes an array first.

    With the name of an `argument`, a ValueError about it where the value does not hold numbers in the usual way.
    """
    if argument is not None:
        value = arguments.tensor(argument, value)
    if isinstance(value, (list, tuple, int, float, bool)):
        value = np.asarray(value)
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype in ("int64", "uint64") and widest_int() == "int32":
        # These would wrap around, and a label of 2^32 become class 0.
        limits = np.iinfo("int32" if value.dtype == "int64" else "uint32")
        value = np.clip(value, limits.min, limits.max)
    return snapshot(value)


def to_float_tensor(value: Tensor, argument: str | None = None) -> Tensor:
    """A tensor of the value's own float dtype, as `to_tensor`; other dtypes become float32."""
    value = to_tensor(value, argument)
    return value if is_float(value) else ops.cast(value, "float32")
