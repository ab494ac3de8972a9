"""Where predictions came from: the logits behind a softmax or sigmoid, and what tells that they are bare probabilities.

Keras leaves the logits of an activation on its output (`_keras_logits`). That is lost when the output is cast, and it
does not say which activation it was; in a TensorFlow graph both can be read from the operation that made the tensor.
"""

import re
import sys
import types
import weakref
from typing import Any, NamedTuple

import keras
from keras import ops
from keras.src.backend.common.tensor_attributes import get_tensor_attr, set_tensor_attr

from keras_xent.kernels import linear
from keras_xent.kernels._compile import differentiable, is_eager
from keras_xent.kernels._rows import selected
from keras_xent.kernels.targets import accumulator_dtype, dtype_of, is_float, to_tensor

_ACTIVATIONS = ("Softmax", "Sigmoid")
# Operations through which a probability passes unchanged. StopGradient is none of them: the logits behind it would
# train what somebody froze.
_TRANSPARENT = {"Cast", "Identity"}
_PRODUCTS = {"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum", "BiasAdd"}
# How far a probability may be rounded out of [0, 1].
_ROUNDING = 1e-3


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

    def statistics(self, labels: Any, counts: Any, logit_softcap: float | None, *, ranks: bool = False) -> Any:
        """What is known of the tokens that count, without their logits; `logit_softcap` where the head has none."""
        _, known = linear.with_statistics(
            self.hidden,
            self.kernel,
            labels,
            self.bias,
            transpose_kernel=self.transpose_kernel,
            mask=counts,
            logit_softcap=self.logit_softcap or logit_softcap,
            ranks=ranks,
        )
        return known


# Logits with a head, for as long as they live.
_with_heads: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def attach(logits: Any, head: Head) -> None:
    """Leaves the head on its logits. Symbolic inputs of Keras, which only have shapes, get none."""
    if not isinstance(logits, keras.KerasTensor):
        set_tensor_attr(logits, "_keras_xent_head", head)
        if not is_eager(logits):
            _with_heads[id(logits)] = logits


def head_of(logits: Any) -> Head | None:
    """The head that made these logits, seen through the casts of a TensorFlow graph; None where none is known."""
    head = get_tensor_attr(logits, "_keras_xent_head")
    operation = _operation(logits)
    if head is not None or operation is None or not operation.outputs:
        return head
    return getattr(operation.outputs[0], "_keras_xent_head", None)


def fusible_logits(predictions: Any, *, axis: int, from_logits: bool = True) -> Any:
    """The logits that may have a head: the predictions, or those behind a softmax. None where a head would not help."""
    # Eager logits are already there, and a head has its classes last.
    if is_eager(predictions) or axis not in (-1, len(predictions.shape) - 1):
        return None
    if from_logits:
        return predictions
    activation, logits = origin(predictions)
    return logits if activation in (None, "softmax") else None


def lost_head(logits: Any) -> Head | None:
    """The head of other logits of the same shape, from which these have been made.

    On JAX, which does not tell, other logits of the same program: then it is probably so. Nothing is known in eager
    mode.
    """
    if is_eager(logits):
        return None
    for other in list(_with_heads.values()):
        if is_eager(other):
            continue
        same_program = _program(other) is _program(logits) is not None
        if other is not logits and same_program and tuple(other.shape) == tuple(logits.shape):
            if _operation(logits) is None or _is_made_from(logits, other):
                return head_of(other)
    return None


def _is_made_from(tensor, other, operations=30):
    """Whether one is found among the inputs of the other, a few operations back."""
    waiting = [tensor.op]
    for operation in waiting:
        if operation is other.op:
            return True
        if len(waiting) < operations:
            waiting += [one.op for one in operation.inputs]
    return False


def _program(tensor):
    """The graph or trace that a tensor belongs to; None for a variable, which belongs to none."""
    return getattr(tensor, "graph" if keras.backend.backend() == "tensorflow" else "_trace", None)


def keras_mask(tensor: Any) -> Any:
    """The mask that Keras left on a tensor, or None."""
    return keras.src.backend.get_keras_mask(tensor)


def read(predictions: Any) -> Any:
    """The predictions themselves, or the value of a variable that holds them."""
    return to_tensor(predictions) if hasattr(predictions, "assign") else predictions


def origin(predictions: Any, activation: str = "softmax") -> tuple[str | None, Any]:
    """The activation ("softmax", "sigmoid" or None for unknown) that made `predictions`, and the logits behind it.

    `(None, None)` where no activation is to be seen. Activations are seen in eager mode and in TensorFlow graphs,
    through the casts of mixed precision. Tensors that JAX traces do not remember theirs: there a model should end in
    logits. Where both activations give the same values, it was `activation`.
    """
    operation = _operation(predictions)
    if operation is not None and operation.type in _ACTIVATIONS:
        return operation.type.lower(), operation.inputs[0]
    logits = getattr(predictions, "_keras_logits", None)
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


def as_logits(predictions: Any, *, from_logits: bool, activation: str, dtype: str | None = None) -> Any:
    """Logits of the given activation for `predictions`: themselves, those behind them, or made from probabilities.

    With a `dtype` they are cast to it, probabilities before their logarithm is taken.
    """
    predictions = read(predictions)
    made_by, behind = origin(predictions, activation)
    known = from_logits
    if behind is not None and made_by in (None, activation):
        predictions, known = behind, True
    predictions = to_tensor(predictions)
    if dtype is not None or not is_float(predictions):
        predictions = ops.cast(predictions, dtype or keras.config.floatx())
    if known:
        return predictions
    return log_probabilities(predictions) if activation == "softmax" else log_odds(predictions)


def why_no_probabilities(predictions: Any) -> str | None:
    """What tells that `predictions`, of which no logits are known, are no probabilities; None if nothing does."""
    if is_eager(predictions):
        predictions = to_tensor(predictions)
        if not is_float(predictions) or 0 in predictions.shape:
            return None
        least, most = float(ops.min(predictions)), float(ops.max(predictions))
        outside = least < -_ROUNDING or most > 1 + _ROUNDING
        return f"holds values from {least:.3g} to {most:.3g}" if outside else None
    made = _unshaped(predictions)
    # A bias that is added to a product, and not the sum of two probabilities.
    parts = map(_unshaped, made.inputs) if made is not None and made.type == "AddV2" else [made]
    return "is a matrix product" if any(p is not None and p.type in _PRODUCTS for p in parts) else None


def _unshaped(tensor):
    operation = _operation(tensor)
    return _unshaped(operation.inputs[0]) if operation is not None and operation.type == "Reshape" else operation


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
    if keras.backend.backend() != "tensorflow" or is_eager(tensor) or hasattr(tensor, "assign"):
        return None
    # A ragged tensor has none.
    operation = getattr(tensor, "op", None)
    while operation is not None and operation.type in _TRANSPARENT:
        operation = operation.inputs[0].op
    return operation


def log_probabilities(probabilities: Any) -> Any:
    """`log p`, which serve as logits of a softmax. Like Keras, no probability is below `keras.config.epsilon()`.

    The gradient is `1 / p` of the clipped probability even where it was clipped: a model that is wrong with certainty
    is told so, where Keras' gradient is 0. Numbers below 0 are no probabilities, and get no gradient.
    """
    return _log(probabilities, smallest=keras.config.epsilon())


def log_odds(probabilities: Any) -> Any:
    """`log p - log (1 - p)`, which serve as logits of a sigmoid; clipped to epsilon and `1 - epsilon` like Keras does.

    The gradient is that of the clipped probability, as for `log_probabilities`; none for numbers outside [0, 1].
    """
    return _odds(probabilities, smallest=keras.config.epsilon())


def _accurate(probabilities):
    return ops.cast(probabilities, accumulator_dtype(probabilities))


def _log_forward(probabilities, *, smallest):
    return ops.log(ops.maximum(_accurate(probabilities), smallest)), ()


def _log_backward(upstream, saved, probabilities, *, smallest):
    p = _accurate(probabilities)
    return _slope(upstream, ops.maximum(p, smallest), p, p < 0, probabilities)


def _odds_forward(probabilities, *, smallest):
    p = ops.clip(_accurate(probabilities), smallest, 1.0 - smallest)
    return ops.log(p) - ops.log1p(-p), ()


def _odds_backward(upstream, saved, probabilities, *, smallest):
    p = _accurate(probabilities)
    clipped = ops.clip(p, smallest, 1.0 - smallest)
    return _slope(upstream, clipped * (1.0 - clipped), p, ops.logical_or(p < 0, p > 1 + _ROUNDING), probabilities)


def _slope(upstream, divisor, p, outside, like):
    # NaN that nobody asked for goes nowhere. It is taken out of the divisor too, for the derivative of this gradient.
    none = ops.logical_or(outside, ops.logical_and(ops.equal(upstream, 0.0), ops.isnan(p)))
    slope = upstream / ops.where(none, ops.ones((), divisor.dtype), divisor)
    return _rounded(selected(slope, ops.logical_not(none)), like)


def _rounded(gradient, like):
    # 1 / epsilon is past the largest float16, which stands for it.
    if dtype_of(like) == "float16":
        gradient = ops.clip(gradient, -65504.0, 65504.0)
    return ops.cast(gradient, like.dtype)


_log = differentiable(_log_forward, _log_backward)
_odds = differentiable(_odds_forward, _odds_backward)


def model_of_step() -> Any:
    """The Keras model whose step calls this, or None."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), keras.Model):
        frame = frame.f_back
    return frame and frame.f_locals["self"]


def softmax_of(model: Any) -> str | None:
    """The name of the layer that makes the only output of a model by a softmax; None if none is known to."""
    outputs = getattr(model, "outputs", None) or []
    operation = outputs[0]._keras_history.operation if len(outputs) == 1 else None
    while operation is not None:
        if (
            isinstance(operation, keras.layers.Softmax)
            or getattr(operation, "activation", None) is keras.activations.softmax
        ):
            return operation.name
        passes = isinstance(operation, keras.layers.Reshape) or type(operation) is keras.layers.Activation
        operation = operation.input._keras_history.operation if passes else None
    return None
