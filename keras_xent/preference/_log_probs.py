"""Log-probabilities as arguments: of a float dtype, and of one shape."""

from keras_xent._types import Tensor
from keras_xent.kernels._dtypes import to_float_tensor, upcast
from keras_xent.kernels._shapes import same_shape


def aligned(**log_probs: Tensor) -> list[Tensor]:
    """The arguments as tensors of at least 32 bits; a ValueError names the one whose shape is not the first's."""
    tensors = [upcast(to_float_tensor(value)) for value in log_probs.values()]
    for name, one in zip(log_probs, tensors, strict=True):
        check_shape(name, one, tensors[0])
    return tensors


def check_shape(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raises a ValueError where the shapes differ."""
    if not same_shape(tensor.shape, like.shape):
        raise ValueError(
            f"`{name}` must have the shape of the policy's log-probabilities, {tuple(like.shape)}. "
            f"Received: shape {tuple(tensor.shape)}."
        )
