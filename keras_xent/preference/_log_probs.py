"""Log-probabilities as arguments: of a float dtype, and of one shape."""

import keras
from keras import ops

from keras_xent import arguments
from keras_xent._types import Tensor
from keras_xent.kernels._dtypes import dtype_of, to_float_tensor, upcast
from keras_xent.kernels._shapes import same_shape


def aligned(**log_probs: Tensor) -> list[Tensor]:
    """The arguments as tensors of one dtype, the first's in at least 32 bits.

    A ValueError names the one that is no tensor of numbers, or whose shape is not the first's.
    """
    tensors = [to_float_tensor(checked(name, value)) for name, value in log_probs.items()]
    for name, one in zip(log_probs, tensors, strict=True):
        check_shape(name, one, tensors[0])
    # Reference log-probabilities come from NumPy, in float64 as likely as not.
    first = upcast(tensors[0])
    return [first, *(ops.cast(one, dtype_of(first)) for one in tensors[1:])]


def of_sequences(**log_probs: Tensor) -> list[Tensor]:
    """`aligned` arguments that hold one number for each completion; a ValueError for those of tokens."""
    tensors = aligned(**log_probs)
    first, *_ = tensors
    if len(first.shape) > 1 and first.shape[-1] != 1:
        raise ValueError(
            f"`{next(iter(log_probs))}` must hold one log-probability for each completion, [B], as "
            f"`keras_xent.sequence_log_probs` gives them. Received: shape {tuple(first.shape)}. Sum those of the "
            "tokens of a completion, and divide by their number where the loss takes means."
        )
    return tensors


def checked(name: str, value: Tensor) -> Tensor:
    """The value; a ValueError with its name where it is no tensor of numbers."""
    # Inside a Functional model they are symbolic.
    return value if isinstance(value, keras.KerasTensor) else arguments.tensor(name, value)


def check_shape(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raises a ValueError where the shapes differ."""
    if not same_shape(tensor.shape, like.shape):
        raise ValueError(
            f"`{name}` must have the shape of the policy's log-probabilities, {tuple(like.shape)}. "
            f"Received: shape {tuple(tensor.shape)}."
        )
