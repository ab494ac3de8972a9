"""Where predictions came from: the output layer and its inputs, the Keras mask, the logits before an activation.

Keras leaves the logits of an activation on its output. That is lost when the output is cast, and it does not say which
activation it was; in a TensorFlow graph both can be read from the operation that made the tensor.
"""

import re
import weakref
from collections.abc import Collection
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_xent import _keras
from keras_xent._backend import get_attribute, is_eager, operation_of, program_of, set_attribute
from keras_xent._types import Tensor
from keras_xent.kernels import linear
from keras_xent.kernels._dtypes import is_float, to_tensor
from keras_xent.kernels._options import SoftmaxOptions
from keras_xent.kernels.probabilities import ROUNDING, log_odds, log_probabilities

_ACTIVATIONS = ("Softmax", "Sigmoid")
_PRODUCTS = {"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum", "BiasAdd"}


class Head(NamedTuple):
    """What the logits of an output layer were made from: `cap(hidden @ kernel + bias)`."""

    hidden: Tensor
    # A snapshot of the variable: the metrics run after the optimizer, and have to see what the loss saw.
    kernel: Tensor
    bias: Tensor = None
    transpose_kernel: bool = False
    logit_softcap: float | None = None
    training: bool = False
    # Which of hidden, kernel and bias are trained.
    gradients: tuple[str, ...] = ("hidden", "kernel", "bias")
    layer: str = ""

    def statistics(self, labels: Tensor, mask: Tensor, logit_softcap: float | None, names: Collection[str] = ()) -> Any:
        """The loss statistics of these names of the valid tokens; `logit_softcap` where the head has none."""
        _, statistics = linear.with_statistics(
            self.hidden,
            self.kernel,
            labels,
            self.bias,
            transpose_kernel=self.transpose_kernel,
            mask=mask,
            options=SoftmaxOptions(logit_softcap=self.logit_softcap or logit_softcap),
            statistics=names,
        )
        return statistics


# Logits with a head, for as long as they live.
_with_heads: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def attach(logits: Tensor, head: Head) -> None:
    """Attaches the head to its logits. Symbolic inputs of Keras, which only have shapes, get none."""
    if not isinstance(logits, keras.KerasTensor):
        set_attribute(logits, "_keras_xent_head", head)
        if not is_eager(logits):
            _with_heads[id(logits)] = logits


def head_of(logits: Tensor) -> Head | None:
    """The head that made these logits, seen through the casts of a TensorFlow graph; None where none is known."""
    head = get_attribute(logits, "_keras_xent_head")
    operation = operation_of(logits)
    if head is not None or operation is None or not operation.outputs:
        return head
    return getattr(operation.outputs[0], "_keras_xent_head", None)


def fusible_logits(predictions: Tensor, *, axis: int, from_logits: bool = True) -> Any:
    """The logits that may have a head: the predictions, or those before a softmax. None where a head would not help."""
    # Eager logits exist already, and a head has its classes last.
    if is_eager(predictions) or axis not in (-1, len(predictions.shape) - 1):
        return None
    if from_logits:
        return predictions
    activation, logits = activation_and_logits(predictions)
    return logits if activation in (None, "softmax") else None


def detached_head(logits: Tensor) -> Head | None:
    """The head of other logits of the same shape, from which these were computed; None in eager mode.

    JAX does not say what a tensor was computed from: there, the head of other logits of the same program.
    """
    if is_eager(logits):
        return None
    for other in list(_with_heads.values()):
        if is_eager(other):
            continue
        same_program = program_of(other) is program_of(logits) is not None
        if other is not logits and same_program and tuple(other.shape) == tuple(logits.shape):
            if operation_of(logits) is None or _is_computed_from(logits, other):
                return head_of(other)
    return None


def _is_computed_from(tensor, other, operations=30):
    """Whether `other` is among the inputs of `tensor`, a few operations back."""
    waiting = [tensor.op]
    for operation in waiting:
        if operation is other.op:
            return True
        if len(waiting) < operations:
            waiting += [one.op for one in operation.inputs]
    return False


def read_variable(predictions: Tensor) -> Tensor:
    """The predictions themselves, or the value of a variable that holds them."""
    return to_tensor(predictions) if hasattr(predictions, "assign") else predictions


def activation_and_logits(predictions: Tensor, activation: str = "softmax") -> tuple[str | None, Any]:
    """The activation ("softmax", "sigmoid" or None for unknown) that made `predictions`, and the logits before it.

    `(None, None)` where no activation is known. Activations are known in eager mode and in TensorFlow graphs, through
    the casts of mixed precision, but not of tensors that JAX traces: there a model should end in logits. Where both
    activations give the same values, it was `activation`.
    """
    operation = operation_of(predictions)
    if operation is not None and operation.type in _ACTIVATIONS:
        return operation.type.lower(), operation.inputs[0]
    logits = _keras.logits_of(predictions)
    if logits is None or not is_eager(logits):
        return None, logits
    # An eager tensor does not know its operation, but its values do.
    sigmoid = _distance(ops.sigmoid(logits), predictions)
    softmax = min(_distance(_softmax(logits, axis), predictions) for axis in range(len(logits.shape)))
    return activation if sigmoid == softmax else "sigmoid" if sigmoid < softmax else "softmax", logits


def _softmax(logits, axis):
    # Keras warns of one class.
    return ops.ones_like(logits) if logits.shape[axis] == 1 else ops.softmax(logits, axis)


def _distance(one, other):
    apart = ops.abs(one - ops.cast(other, one.dtype))
    return float(ops.max(ops.where(ops.isnan(apart), ops.zeros_like(apart), apart), initial=0.0))


def as_logits(predictions: Tensor, *, from_logits: bool, activation: str, dtype: str | None = None) -> Any:
    """Logits of the given activation for `predictions`: themselves, those before it, or made from probabilities.

    With a `dtype` they are cast to it, probabilities before their logarithm is taken.
    """
    predictions = read_variable(predictions)
    made_by, pre_activation = activation_and_logits(predictions, activation)
    known = from_logits
    if pre_activation is not None and made_by in (None, activation):
        predictions, known = pre_activation, True
    predictions = to_tensor(predictions)
    if dtype is not None or not is_float(predictions):
        predictions = ops.cast(predictions, dtype or keras.config.floatx())
    if known:
        return predictions
    return log_probabilities(predictions) if activation == "softmax" else log_odds(predictions)


def describe_invalid_probabilities(predictions: Tensor) -> str | None:
    """Why `predictions`, of which no logits are known, cannot be probabilities; None if they may be."""
    if is_eager(predictions):
        predictions = to_tensor(predictions)
        if not is_float(predictions) or 0 in predictions.shape:
            return None
        least, most = float(ops.min(predictions)), float(ops.max(predictions))
        outside = least < -ROUNDING or most > 1 + ROUNDING
        return f"holds values from {least:.3g} to {most:.3g}" if outside else None
    made = _skip_reshapes(predictions)
    # A bias that is added to a product, rather than the sum of two probabilities.
    parts = map(_skip_reshapes, made.inputs) if made is not None and made.type == "AddV2" else [made]
    return "is a matrix product" if any(p is not None and p.type in _PRODUCTS for p in parts) else None


def _skip_reshapes(tensor):
    operation = operation_of(tensor)
    return _skip_reshapes(operation.inputs[0]) if operation is not None and operation.type == "Reshape" else operation


def layer_of(predictions: Tensor) -> str:
    """The name of the layer that made `predictions`, for a message."""
    operation = operation_of(predictions)
    if operation is None or "/" not in operation.name:
        return "the last layer"
    *parents, layer, _ = operation.name.split("/")
    # Keras opens the scopes of a model and its layers twice, and TensorFlow numbers the second time.
    again = re.search(r"_\d+$", layer)
    if again and parents and parents[-1].endswith(again[0]):
        layer = layer.removesuffix(again[0])
    return f"layer '{layer}'"


def softmax_layer_of(model: Any) -> str | None:
    """The name of the layer that ends the only output of a model in a softmax; None if none is known to."""
    outputs = getattr(model, "outputs", None) or []
    made = _keras.producer(outputs[0]) if len(outputs) == 1 else None
    while made is not None:
        if (
            isinstance(made.layer, keras.layers.Softmax)
            or getattr(made.layer, "activation", None) is keras.activations.softmax
        ):
            return made.layer.name
        passes_on = isinstance(made.layer, keras.layers.Reshape) or type(made.layer) is keras.layers.Activation
        made = _keras.producer(made.input) if passes_on and made.input is not None else None
    return None
