"""Calling a model up to its output layer, so that its logits are not computed, in eager mode either."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_xent import _keras, provenance
from keras_xent._backend import is_eager
from keras_xent._types import Tensor
from keras_xent.layers.fuse_head import output_layer
from keras_xent.layers.logits_dense import dense_head
from keras_xent.layers.tied_logits import embedding_head
from keras_xent.provenance import Head

_HEADS = (keras.layers.Dense, keras.layers.ReversibleEmbedding)
_ACTIVATIONS = (None, keras.activations.linear, keras.activations.softmax)


class Output(NamedTuple):
    """The output of a model: its head, from which logits can be computed, or the logits."""

    head: Head | None
    logits: Tensor
    # The Keras mask of the output, or None.
    mask: Tensor


def call_without_logits(model: Any, x: Any, training: bool | None = None) -> Output:
    """The model's output, as a head wherever its output layer is a `Dense` or a `ReversibleEmbedding`.

    Of a Functional or Sequential model the output layer is known. A subclassed model has to return what a `LogitsDense`
    or `TiedLogits` layer gave it, itself.
    """
    layer = output_layer(model)
    if layer is not None and _is_head(layer):
        with _heads_of([layer]) as found:
            returned = model(x, training=training)
        # A model may call its output layer in a way of its own, and never come here.
        if found:
            return Output(found[-1][0], None, _keras.mask_of(returned))
    elif layer is None and (layers := [one for one in _keras.all_layers(model) if _is_logits_layer(one)]):
        try:
            with _heads_of(layers) as found:
                returned = model(x, training=training)
        except Exception:  # What comes after the head did not expect a stand-in; the call below tells the truth.
            found = []
        heads = [head for head, stand_in in found if stand_in is returned]
        if heads:
            return Output(heads[-1], None, _keras.mask_of(returned))
    predictions = model(x, training=training)
    mask = _keras.mask_of(predictions)
    expected = "sigmoid" if predictions.shape[-1] == 1 else "softmax"
    activation, logits = provenance.activation_and_logits(predictions, expected)
    logits = logits if activation == expected else predictions
    return Output(None if is_eager(logits) else provenance.head_of(logits), logits, mask)


def _is_logits_layer(layer):
    return getattr(layer, "carries_provenance", False) and _is_head(layer)


def _is_head(layer):
    is_plain = isinstance(layer, _HEADS) and not getattr(layer, "quantization_mode", None)
    return is_plain and getattr(layer, "activation", None) in _ACTIVATIONS


@contextlib.contextmanager
def _heads_of(layers: list) -> Iterator[list]:
    """Makes each layer return a stand-in for its logits; yields the heads and stand-ins of the calls."""
    found: list[tuple[Head, Tensor]] = []

    def stand_in_for(layer, call):
        def make_stand_in(inputs, *args, **kwargs):
            is_embedding = isinstance(layer, keras.layers.ReversibleEmbedding)
            if is_embedding and not (kwargs.get("reverse") or (args and args[0])):
                return call(inputs, *args, **kwargs)
            # One number for each token, of which nothing is computed.
            stand_in = ops.zeros((*ops.shape(inputs)[:-1], 1), inputs.dtype)
            found.append(((embedding_head if is_embedding else dense_head)(layer, inputs), stand_in))
            return stand_in

        return make_stand_in

    calls = [(layer, vars(layer).get("call")) for layer in layers]
    try:
        for layer, _ in calls:
            # Past the tracking of Keras, which takes what is set for a part of the layer.
            object.__setattr__(layer, "call", stand_in_for(layer, layer.call))
        yield found
    finally:
        for layer, own in calls:
            if own is None:
                object.__delattr__(layer, "call")
            else:
                object.__setattr__(layer, "call", own)
