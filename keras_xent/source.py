"""Where predictions came from: the logits behind a softmax or sigmoid, and what tells that they are bare probabilities.

Keras leaves the logits of an activation on its output (`_keras_logits`). That is lost when the output is cast, and it
does not say which activation it was; in a TensorFlow graph both can be read from the operation that made the tensor.
"""

import re
from typing import Any, NamedTuple

import keras
from keras import ops
from keras.src.backend.common.tensor_attributes import get_tensor_attr, set_tensor_attr

from keras_xent.kernels._compile import differentiable, is_eager
from keras_xent.kernels.targets import accumulator_dtype, dtype_of, is_float, to_tensor

_ACTIVATIONS = ("Softmax", "Sigmoid")
# Operations through which a probability passes unchanged.
_TRANSPARENT = {"Cast", "Identity", "StopGradient"}


class Head(NamedTuple):
    """What the logits of an output layer were made from: `cap(hidden @ kernel + bias)`."""

    hidden: Any
    # A read of the variable: the metrics run after the optimizer, and have to see what the loss saw.
    kernel: Any
    bias: Any = None
    transpose_kernel: bool = False
    logit_softcap: float | None = None
    training: bool = False
    # Which of hidden, kernel and bias are trained.
    gradients: tuple[str, ...] = ("hidden", "kernel", "bias")
    layer: str = ""


def attach(logits: Any, head: Head) -> None:
    """Leaves the head on its logits. Symbolic inputs of Keras, which only have shapes, get none."""
    if not isinstance(logits, keras.KerasTensor):
        set_tensor_attr(logits, "_keras_xent_head", head)


def head_of(logits: Any) -> Head | None:
    """The head that made these logits, seen through the casts of a TensorFlow graph; None where none is known."""
    head = get_tensor_attr(logits, "_keras_xent_head")
    operation = _operation(logits) if head is None else None
    return (
        getattr(operation.outputs[0], "_keras_xent_head", None) if operation is not None and operation.outputs else head
    )


def keras_mask(tensor: Any) -> Any:
    """The mask that Keras left on a tensor, or None."""
    return keras.src.backend.get_keras_mask(tensor)


def origin(predictions: Any) -> tuple[str | None, Any]:
    """The activation ("softmax", "sigmoid" or None for unknown) that made `predictions`, and the logits behind it.

    `(None, None)` where no activation is to be seen. Activations are seen in eager mode and in TensorFlow graphs,
    through the casts of mixed precision. Tensors that JAX traces do not remember theirs: there a model should end in
    logits.
    """
    operation = _operation(predictions)
    if operation is not None and operation.type in _ACTIVATIONS:
        return operation.type.lower(), operation.inputs[0]
    logits = getattr(predictions, "_keras_logits", None)
    if logits is None or not is_eager(logits):
        return None, logits
    # An eager tensor does not know its operation, but a sigmoid can be told by its values.
    distance = ops.max(ops.abs(ops.sigmoid(logits) - ops.cast(predictions, logits.dtype)))
    return ("sigmoid" if float(distance) < 1e-2 else "softmax"), logits


def as_logits(predictions: Any, *, from_logits: bool, activation: str) -> Any:
    """Logits of the given activation for `predictions`: themselves, those behind them, or made from probabilities."""
    made_by, behind = origin(predictions)
    if behind is not None and made_by in (None, activation):
        return behind
    predictions = to_tensor(predictions)
    if not is_float(predictions):
        predictions = ops.cast(predictions, keras.config.floatx())
    if from_logits:
        return predictions
    return log_probabilities(predictions) if activation == "softmax" else log_odds(predictions)


def layer_of(predictions: Any) -> str:
    """The name of the layer that made `predictions`, for a message."""
    operation = _operation(predictions)
    if operation is None or "/" not in operation.name:
        return "the last layer"
    *parents, layer, _ = operation.name.split("/")
    # Keras opens the scopes of a model and its layers twice, and TensorFlow numbers the second time.
    again = re.search(r"_\d+$", layer)
    if again and parents and parents[-1].endswith(again[0]):
        layer = layer.removesuffix(again[0])
    return f"layer '{layer}'"


def _operation(tensor):
    """The operation of a TensorFlow graph that made the tensor, seen through casts; None elsewhere."""
    if keras.backend.backend() != "tensorflow" or is_eager(tensor):
        return None
    operation = tensor.op
    while operation.type in _TRANSPARENT:
        operation = operation.inputs[0].op
    return operation


def log_probabilities(probabilities: Any) -> Any:
    """`log p`, which serve as logits of a softmax. Like Keras, no probability is below `keras.config.epsilon()`.

    The gradient is `1 / p` of the clipped probability even where it was clipped: a model that is wrong with certainty
    is told so, where Keras' gradient is 0.
    """
    return _log(probabilities, smallest=keras.config.epsilon())


def log_odds(probabilities: Any) -> Any:
    """`log p - log (1 - p)`, which serve as logits of a sigmoid; clipped to epsilon and `1 - epsilon` like Keras does.

    The gradient is that of the clipped probability, as for `log_probabilities`.
    """
    return _odds(probabilities, smallest=keras.config.epsilon())


def _accurate(probabilities):
    return ops.cast(probabilities, accumulator_dtype(probabilities))


def _log_forward(probabilities, *, smallest):
    return ops.log(ops.maximum(_accurate(probabilities), smallest)), ()


def _log_backward(upstream, saved, probabilities, *, smallest):
    return _rounded(upstream / ops.maximum(_accurate(probabilities), smallest), probabilities)


def _odds_forward(probabilities, *, smallest):
    p = ops.clip(_accurate(probabilities), smallest, 1.0 - smallest)
    return ops.log(p) - ops.log1p(-p), ()


def _odds_backward(upstream, saved, probabilities, *, smallest):
    p = ops.clip(_accurate(probabilities), smallest, 1.0 - smallest)
    return _rounded(upstream / (p * (1.0 - p)), probabilities)


def _rounded(gradient, like):
    # 1 / epsilon is past the largest float16, which stands for it.
    if dtype_of(like) == "float16":
        gradient = ops.clip(gradient, -65504.0, 65504.0)
    return ops.cast(gradient, like.dtype)


_log = differentiable(_log_forward, _log_backward)
_odds = differentiable(_odds_forward, _odds_backward)
