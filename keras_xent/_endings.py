"""Detection of whether a model ends in logits or in probabilities, from its layers and the operations of its graph."""

import re
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_xent import _keras
from keras_xent._backend import is_eager, operation_of, traced_ending
from keras_xent._types import Tensor
from keras_xent.kernels._dtypes import is_float, to_tensor
from keras_xent.kernels.probabilities import ROUNDING, are_distributions

_PRODUCTS = {"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum", "BiasAdd", "Conv2D", "Conv3D"}
_PRODUCTS |= {"DepthwiseConv2dNative", "Conv2DBackpropInput", "Conv3DBackpropInputV2"}
_SUMS = {"Add", "AddV2"}
# Operations after which logits are logits.
_RESHAPES = {"Reshape", "Squeeze", "ExpandDims", "Transpose", "StridedSlice", "Mean", "AvgPool", "AvgPool3D"}
_RESHAPES |= {"ResizeBilinear", "ResizeNearestNeighbor"}
_DIMENSIONS = ("1D", "2D", "3D")
# Layers after which logits are logits, and probabilities are probabilities.
_PASSED_ON = ["Reshape", "Flatten", "Permute", "Dropout", "Identity", "Resizing"]
_PASSED_ON += [f"{kind}{n}" for kind in ("Cropping", "UpSampling", "GlobalAveragePooling") for n in _DIMENSIONS]
_PASSED_ON += [f"{kind}{n}" for kind in ("AveragePooling", "GlobalMaxPooling", "MaxPooling") for n in _DIMENSIONS]
_LINEAR = ["Dense", "EinsumDense", "ReversibleEmbedding"]
_LINEAR += [f"{kind}{n}" for kind in ("Conv", "SeparableConv", "DepthwiseConv") for n in _DIMENSIONS]
_LINEAR += [f"Conv{n}Transpose" for n in _DIMENSIONS]
_NO_PROBABILITIES = {"linear": "is a matrix product", "log_softmax": "is the logarithm of a softmax"}


def describe_invalid_probabilities(predictions: Tensor) -> str | None:
    """Returns why `predictions`, whose logits are not known, cannot be probabilities; None if they may be."""
    if is_eager(predictions):
        predictions = to_tensor(predictions)
        if not is_float(predictions) or 0 in predictions.shape:
            return None
        least, most = float(ops.min(predictions)), float(ops.max(predictions))
        outside = least < -ROUNDING or most > 1 + ROUNDING
        return f"holds values from {least:.3g} to {most:.3g}" if outside else None
    end = ending(predictions)
    if end is not None:
        return _NO_PROBABILITIES.get(end.kind)
    made = _skip_reshapes(predictions)
    if made is not None and made.type == "LogSoftmax":
        return _NO_PROBABILITIES["log_softmax"]
    # A bias that is added to a product, rather than the sum of two probabilities.
    parts = map(_skip_reshapes, made.inputs) if made is not None and made.type in _SUMS else [made]
    return _NO_PROBABILITIES["linear"] if any(map(_is_product, parts)) else None


def _skip_reshapes(tensor):
    operation = operation_of(tensor)
    while operation is not None and operation.type in _RESHAPES:
        operation = operation_of(operation.inputs[0])
    return operation


def _is_product(operation):
    # The product of probabilities and a matrix of transitions is one of probabilities again.
    if operation is None or operation.type not in _PRODUCTS:
        return False
    inputs = [_skip_reshapes(tensor) for tensor in operation.inputs]
    return not any(made is not None and made.type == "Softmax" for made in inputs)


class Ending(NamedTuple):
    """The end of a model."""

    # The name of the layer, empty where it has none.
    layer: str
    # "softmax", "sigmoid", "log_softmax" or "linear".
    kind: str


def ending(predictions: Tensor) -> Ending | None:
    """Returns how the model of this step ends in `predictions`; None where that is not known.

    The layers of the model show it, or what JAX has traced: a subclassed model does not name its output.
    """
    output = _keras.symbolic_output(predictions)
    found = None if output is None else ending_of(output)
    traced = traced_ending(predictions) if found is None else None
    return found if traced is None else Ending(*traced)


def ending_of(output: Any) -> Ending | None:
    """The end of a model in one of its symbolic outputs; None where its layers do not show it."""
    made = _keras.producer(output)
    layer = made.layer
    if isinstance(layer, keras.layers.TimeDistributed):
        layer = layer.layer
    if isinstance(layer, keras.Model):
        inner = getattr(layer, "outputs", None) or []
        return ending_of(inner[0]) if len(inner) == 1 else None
    does_nothing = type(layer) is keras.layers.Activation and _activation_of(layer) == "linear"
    if does_nothing or isinstance(layer, _layers(_PASSED_ON)):
        return None if made.input is None else ending_of(made.input)
    kind = "softmax" if isinstance(layer, keras.layers.Softmax) else _activation_of(layer)
    if kind == "linear":
        before = None if made.input is None else ending_of(made.input)
        is_transition = before is not None and before.kind == "softmax" and not getattr(layer, "use_bias", True)
        if not isinstance(layer, _layers(_LINEAR)) or is_transition:
            return None
    return None if kind is None else Ending(layer.name, kind)


def _activation_of(layer):
    activation = getattr(layer, "activation", "no such attribute")
    if activation is None or activation is keras.activations.linear:
        return "linear"
    known = ("softmax", "sigmoid", "log_softmax")
    return next((name for name in known if activation is getattr(keras.activations, name)), None)


def _layers(names):
    return tuple(kind for name in names for kind in [getattr(keras.layers, name, None)] if kind is not None)


def layer_of(predictions: Tensor) -> str:
    """The name of the layer that made `predictions`, for a message."""
    end = None if is_eager(predictions) else ending(predictions)
    if end is not None:
        return f"layer '{end.layer}'" if end.layer else "the last layer"
    operation = operation_of(predictions)
    if operation is None or "/" not in operation.name:
        return "the last layer"
    *parents, layer, _ = operation.name.split("/")
    # Keras opens the scopes of a model and its layers twice, and TensorFlow numbers the second time.
    again = re.search(r"_\d+$", layer)
    if again and parents and parents[-1].endswith(again[0]):
        layer = layer.removesuffix(again[0])
    return f"layer '{layer}'"


def misread(predictions: Tensor, *, from_logits: bool, activation: str, axis: int) -> str | None:
    """Returns why a metric reads predictions as what they are not, and what to do; None if nothing speaks for that.

    The logits before `activation` are not known.
    """
    if not from_logits:
        why = describe_invalid_probabilities(predictions)
        return why and f"the output of {layer_of(predictions)} {why}. If these are logits, set from_logits=True."
    if not is_eager(predictions):
        layer = _layer_with(activation, predictions) if _keras.model_of_step() else None
        reason = layer and f"the layer '{layer}' makes probabilities of them by a {activation}"
    else:
        is_sure = activation == "softmax" and are_distributions(predictions, axis)
        reason = "the rows of `y_pred` are probabilities: none is below 0, and they sum to 1" if is_sure else None
    return reason and f"{reason}. Set from_logits=False, or end the model in logits."


def _layer_with(activation, predictions):
    """The name of the layer that ends the model of this step in an activation; None if none is known to."""
    output = _keras.symbolic_output(predictions)
    if output is None:
        output = _keras.only_output()
    end = None if output is None else ending_of(output)
    return end.layer if end is not None and end.kind == activation else None
