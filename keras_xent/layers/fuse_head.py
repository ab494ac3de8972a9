"""Fused heads for existing models."""

import warnings
from typing import Any

import keras

from keras_xent import _keras
from keras_xent.layers.logits_dense import LogitsDense, call_dense, call_quantized_dense
from keras_xent.layers.tied_logits import TiedLogits, call_embedding, call_quantized_embedding

# What a layer of each class is given as its `call` and `quantized_call`.
_CALLS = {
    keras.layers.Dense: (call_dense, call_quantized_dense),
    keras.layers.ReversibleEmbedding: (call_embedding, call_quantized_embedding),
}


def fuse_head(model: Any, layer: Any = None) -> Any:
    """Lets losses compute the logits of an existing model in chunks, as those of `LogitsDense`, and returns the model.

    For a model that was built or loaded, or a KerasHub `CausalLM`. Call it before `compile`, and compile with a loss of
    this package. The output layer has to be a `keras.layers.Dense` or a `keras.layers.ReversibleEmbedding`, which a
    linear `Activation` may follow. It keeps its class, weights and configuration: the model is saved as the plain model
    that it was, and a loaded, copied or pickled model has to be fused again.

    Args:
        model: a Keras model.
        layer: the output layer, or its name, where it cannot be found (subclassed models, several outputs).

    Returns:
        The model.

    Raises:
        ValueError: no output layer of these kinds is found.

    Warns:
        UserWarning: the layer is quantized, other than to int8 or int4. It is left as it is.

    Example:

    >>> import keras
    >>> import keras_xent as kx
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(100)])
    >>> model = kx.fuse_head(model)
    >>> model.compile("adam", loss=kx.losses.SparseCategoricalCrossentropy(from_logits=True))
    """
    head = _named(model, layer) if layer is not None else output_layer(model)
    if isinstance(head, (LogitsDense, TiedLogits)) or is_fused(head):
        return model
    # KerasHub's embedding is a subclass that adds nothing.
    kinds = [kind for kind in _CALLS if computes_as(head, kind)]
    if not kinds:
        raise ValueError(
            "`model` must end in a `keras.layers.Dense` or a `keras.layers.ReversibleEmbedding`. "
            f"Received: model '{model.name}' with {_described(head)} at its end. Name the output layer with "
            "`layer`, or build the model with `keras_xent.layers.LogitsDense`."
        )
    if getattr(head, "quantization_mode", None) not in (None, "int8", "int4"):
        warnings.warn(
            f"fuse_head leaves layer '{head.name}' as it is, since it is quantized ({head.quantization_mode}): its "
            "kernel is no matrix that is known, and a loss reads its logits.",
            stacklevel=2,
        )
        return model
    _keras.set_call(head, *_CALLS[kinds[0]])
    # What was traced before called the layer as it was.
    for made in ("train_function", "test_function", "predict_function"):
        if getattr(model, made, None) is not None:
            setattr(model, made, None)
    return model


def is_fused(layer: Any) -> bool:
    """Returns whether `fuse_head` has given this layer a `call` of its own."""
    call = getattr(vars(layer).get("call"), "__func__", None) if isinstance(layer, keras.Layer) else None
    return any(call is own for own, _ in _CALLS.values())


def computes_as(layer: Any, kind: type) -> bool:
    """Returns whether a layer is of this class, or of a subclass that does not change what a call returns."""
    names = "call", "__call__"
    return isinstance(layer, kind) and all(getattr(type(layer), name) is getattr(kind, name) for name in names)


def _named(model, layer):
    if not isinstance(layer, str):
        return layer
    found = [one for one in _keras.all_layers(model) if one.name == layer]
    if not found:
        layers = _keras.all_layers(model, include_self=False)
        names = ", ".join(repr(one.name) for one in layers if type(one) is not keras.layers.InputLayer)
        raise ValueError(f"`layer` must be a layer of the model or its name, one of {names}. Received: {layer!r}.")
    return found[0]


def output_layer(model: Any, *, as_called: bool = False) -> Any:
    """The layer that makes the one output of a Functional or Sequential model, or None where it is not known.

    With `as_called` it is not known either of a subclass whose own `call` may return something else.
    """
    if as_called and has_own_call(model):
        return None
    if isinstance(model, keras.Sequential):
        layers = [layer for layer in model.layers if not _is_linear(layer)]
        return _inside(layers[-1], as_called) if layers else None
    outputs = getattr(model, "outputs", None) or []
    if len(outputs) != 1:
        return None
    made = _keras.producer(outputs[0])
    while _is_linear(made.layer):
        made = _keras.producer(made.input)
    return _inside(made.layer, as_called)


def has_own_call(model: Any) -> bool:
    """Returns whether a model's class does not leave it to Keras to call the layers."""
    # Not `__call__`: that of KerasHub's models refuses strings, and changes nothing.
    return type(model).call.__module__.split(".")[0] != "keras"


def _inside(layer, as_called):
    return output_layer(layer, as_called=as_called) if isinstance(layer, keras.Model) else layer


def _is_linear(layer):
    return isinstance(layer, keras.layers.Activation) and layer.activation is keras.activations.linear


def _described(layer):
    return "no layer that is known" if layer is None else f"layer '{layer.name}' of class {type(layer).__name__}"
