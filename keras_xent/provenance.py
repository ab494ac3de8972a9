"""The origin of predictions: the output layer and its inputs, the Keras mask, the logits before an activation.

Keras leaves the logits of an activation on its output. That is lost when the output is cast, and it does not say which
activation it was; in a TensorFlow graph both can be read from the operation that made the tensor.
"""

import math
import weakref
from collections.abc import Collection
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_xent import _keras
from keras_xent._backend import (
    constant_of,
    get_attribute,
    is_eager,
    let_tracers_keep,
    matmul,
    note_beside,
    operation_of,
    program_of,
    set_attribute,
)
from keras_xent._types import Tensor
from keras_xent.kernels import linear
from keras_xent.kernels._dtypes import dtype_of, is_float, to_tensor
from keras_xent.kernels._linear_pass import Matrices, checked_matrices
from keras_xent.kernels.probabilities import log_odds, log_probabilities

_ACTIVATIONS = ("Softmax", "Sigmoid")
let_tracers_keep(_keras.LOGITS, _keras.activation_at_work)


class Head(NamedTuple):
    """The inputs of an output layer: its logits are `cap(hidden @ kernel + bias)`."""

    hidden: Tensor
    # A snapshot of the variable: the metrics run after the optimizer, and have to see what the loss saw.
    kernel: Tensor
    bias: Tensor = None
    transpose_kernel: bool = False
    logit_softcap: float | None = None
    training: bool = False
    # Which of hidden, kernel, bias and low_rank are trained.
    gradients: tuple[str, ...] = ("hidden", "kernel", "bias", "low_rank")
    layer: str = ""
    # The most memory that a chunk of logits may take.
    chunk_bytes: int | None = None
    # Two factors (LoRA) whose product is added to the kernel, or None.
    low_rank: tuple[Tensor, Tensor] | None = None

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return self.kernel.shape[0 if self.transpose_kernel else 1]

    def arguments(self) -> dict[str, Any]:
        """The arguments that every kernel of a head has."""
        names = "hidden", "kernel", "bias", "transpose_kernel", "low_rank", "chunk_bytes"
        return {name: getattr(self, name) for name in names}

    def matrices(self) -> Matrices:
        """The inputs as a kernel takes them."""
        return checked_matrices(self.hidden, self.kernel, self.bias, self.transpose_kernel, low_rank=self.low_rank)

    def merged_kernel(self) -> Tensor:
        """The kernel with the product of its factors, for what takes one matrix."""
        if self.low_rank is None:
            return self.kernel
        first, second = self.low_rank
        return ops.cast(ops.cast(self.kernel, first.dtype) + ops.matmul(first, second), self.kernel.dtype)

    def logits_of(self, rows: Tensor) -> Tensor:
        """The logits of some hidden states `[n, D]`, before the soft cap."""
        logits = matmul(rows, self.merged_kernel(), transpose_b=self.transpose_kernel)  # [n, V]
        return logits if self.bias is None else logits + self.bias

    def statistics(self, labels: Tensor, mask: Tensor, logit_softcap: float | None, names: Collection[str] = ()) -> Any:
        """The loss statistics of these names of the valid tokens; `logit_softcap` where the head has none."""
        softcap = self.logit_softcap or logit_softcap
        asked = {"labels": labels, "mask": mask, "logit_softcap": softcap, "return_statistics": names}
        return linear.linear_cross_entropy(**asked, **self.arguments())[1]


# Logits with a head, for as long as they live.
_with_heads: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def attach(logits: Tensor, head: Head) -> None:
    """Attaches the head to its logits. Symbolic inputs of Keras, which only have shapes, get none."""
    if not isinstance(logits, keras.KerasTensor):
        set_attribute(logits, "_keras_xent_head", head)
        if not is_eager(logits):
            _with_heads[id(logits)] = logits


def is_training(training: Any) -> bool:
    """The `training` of a call as a bool. Under rematerialization JAX traces it; the result is not used there."""
    # Not by `is_eager` alone: in a graph nothing is eager, not even a bool.
    return True if ops.is_tensor(training) and not is_eager(training) else bool(training)


def mark_materialized(logits: Tensor, layer: str, reason: str) -> None:
    """Attaches to logits without a head the reason for that, which the warning of the loss states."""
    if not isinstance(logits, keras.KerasTensor):
        set_attribute(logits, "_keras_xent_materialized", f"layer '{layer}' {reason}")


def materialized_because(logits: Tensor) -> str | None:
    """Returns the reason that `mark_materialized` has attached, or None."""
    return get_attribute(logits, "_keras_xent_materialized")


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
    return logits if activation == "softmax" else None


def detached_head(logits: Tensor) -> str | None:
    """The name of the layer of a head from whose logits these were computed; None in eager mode, or if there is none.

    It is found among the layers of the model, among the operations of a TensorFlow graph, or, for a model of JAX whose
    layers are not known, among the logits that its program has made so far.
    """
    if is_eager(logits):
        return None
    output = _keras.symbolic_output(logits)
    if output is not None:
        made_by = (layer.name for layer, one in _keras.ancestors(output) if _has_head_of(layer, one, logits))
        return next(made_by, None)
    if operation_of(logits) is not None:
        return _head_behind(logits)
    for other in list(_with_heads.values()):
        same_program = not is_eager(other) and program_of(other) is program_of(logits) is not None
        if other is not logits and same_program and other.shape[-1] == logits.shape[-1]:
            head = head_of(other)
            return None if head is None else head.layer
    return None


def _has_head_of(layer, output, logits):
    return getattr(layer, "carries_provenance", False) and output.shape[-1:] == tuple(logits.shape[-1:])


def _head_behind(tensor, operations=60):
    """The layer of a head that is among the inputs of a tensor of a graph, a few operations back."""
    waiting = [tensor.op]
    for operation in waiting:
        for output in operation.outputs:
            head = getattr(output, "_keras_xent_head", None)
            if head is not None and output is not tensor and output.shape[-1:] == tensor.shape[-1:]:
                return head.layer
        if len(waiting) < operations:
            waiting += [one.op for one in operation.inputs]
    return None


def read_variable(predictions: Tensor) -> Tensor:
    """The predictions themselves, or the tensor of a variable, a list or a number that holds them."""
    is_tensor = hasattr(predictions, "shape") and not hasattr(predictions, "assign")
    return predictions if is_tensor else to_tensor(predictions)


def activation_and_logits(predictions: Tensor, activation: str = "softmax", axis: int = -1) -> tuple[str | None, Any]:
    """The activation ("softmax" over `axis`, "sigmoid", "other") that made `predictions`, and the logits before it.

    `(None, None)` where no activation is known. Activations are known in eager mode, in TensorFlow graphs, through the
    casts of mixed precision, and of what JAX traces, if it is what an activation of Keras returned, itself. Where both
    activations give the same values, it was `activation`.
    """
    operation, over = _activation_operation(predictions)
    if operation is not None:
        # The logits that Keras leaves lie as the predictions do, those of the operation may be transposed.
        is_last = over == len(operation.inputs[0].shape) - 1
        logits = operation.inputs[0] if is_last else _keras.logits_of(predictions)
        if operation.type == "Sigmoid":
            return "sigmoid", operation.inputs[0]
        same_axis = over == axis % len(predictions.shape)
        return ("softmax" if same_axis and logits is not None else "other"), logits
    logits = _keras.logits_of(predictions)
    if logits is None:
        return None, None
    if not is_eager(logits):
        kind, over = note_beside(predictions, _keras.LOGITS) or (None, None)
        if kind not in ("softmax", "sigmoid"):
            return None, None
        same_axis = isinstance(over, int) and (over - axis) % len(logits.shape) == 0
        return ("other" if kind == "softmax" and not same_axis else kind), logits
    # An eager tensor does not know its operation, but its values do.
    rank = len(logits.shape)
    sigmoid = _distance(ops.sigmoid(logits), predictions)
    softmaxes = [_distance(_softmax(logits, a), predictions) for a in range(rank)]
    softmax = min(softmaxes, default=math.inf)
    if sigmoid == softmax and activation == "sigmoid" or sigmoid < softmax:
        return "sigmoid", logits
    return ("softmax" if softmaxes[axis % rank] == softmax else "other"), logits


def _activation_operation(predictions):
    """The operation of an activation that made `predictions`, and the axis of a softmax; `(None, None)` if unknown."""
    operation = operation_of(predictions)
    axis = len(predictions.shape) - 1 if operation is not None else None
    if operation is not None and operation.type == "Transpose":
        # What a softmax over another axis than the last one ends in.
        order, operation = constant_of(operation.inputs[1]), operation_of(operation.inputs[0])
        if operation is None or operation.type != "Softmax":
            return None, None
        axis = _last_axis_before(predictions, operation.outputs[0]) if order is None else list(order).index(axis)
        if axis is None:
            return None, None
    return (operation, axis) if operation is not None and operation.type in _ACTIVATIONS else (None, None)


def _last_axis_before(predictions, swapped):
    """The axis that is the last one in `swapped`, whose other axes lie as those of the predictions; None if unclear.

    TensorFlow computes in the graph how the axes lie, but not their sizes.
    """

    def exchanged(axis):
        sizes = list(predictions.shape)
        sizes[axis], sizes[-1] = sizes[-1], sizes[axis]
        return sizes

    found = [axis for axis in range(len(predictions.shape) - 1) if exchanged(axis) == list(swapped.shape)]
    return found[0] if len(found) == 1 else None


def reading(predictions: Tensor, *, axis: int, from_logits: bool) -> str:
    """Returns how a loss or metric of classes reads predictions: "logits", "probabilities", or the input of a softmax.

    The latter does not depend on `from_logits`. No values are read.
    """
    if _is_softmax(predictions, axis):
        return "logits before a softmax"
    return "logits" if from_logits else "probabilities"


def _is_softmax(predictions, axis):
    if is_eager(predictions):
        return _keras.logits_of(predictions) is not None
    return activation_and_logits(predictions, "softmax", axis)[0] == "softmax"


def _softmax(logits, axis):
    # Keras warns of one class.
    return ops.ones_like(logits) if logits.shape[axis] == 1 else ops.softmax(logits, axis)


def _distance(one, other):
    apart = ops.abs(one - ops.cast(other, one.dtype))
    return float(ops.max(ops.where(ops.isnan(apart), ops.zeros_like(apart), apart), initial=0.0))


def as_logits(
    predictions: Tensor,
    *,
    from_logits: bool,
    activation: str,
    axis: int = -1,
    dtype: str | None = None,
    is_clipped: bool = True,
) -> Any:
    """Logits of the given activation for `predictions`: themselves, those before it, or made from probabilities.

    With a `dtype` they are cast to it, probabilities before their logarithm is taken. `is_clipped` is that
    of `log_probabilities`.
    """
    made_by, pre_activation = activation_and_logits(predictions, activation, axis)
    known = from_logits
    if pre_activation is not None and made_by == activation:
        predictions, known = pre_activation, True
    predictions = to_tensor(predictions)
    if dtype is not None or not is_float(predictions):
        predictions = ops.cast(predictions, dtype or keras.config.floatx())
    if known:
        return predictions
    is_loss_scaled = _keras.is_loss_scaled() if dtype_of(predictions) == "float16" else None
    if activation == "sigmoid":
        return log_odds(predictions, is_loss_scaled=is_loss_scaled)
    return log_probabilities(predictions, is_clipped=is_clipped, is_loss_scaled=is_loss_scaled)
