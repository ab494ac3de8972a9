"""Calling a model up to its output layer, so that its logits are not computed, in eager mode either."""

import contextlib
import contextvars
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_xent import _endings, _keras, provenance
from keras_xent._backend import is_eager, is_traced, replace_own, restore_own, snapshot, traced_ending
from keras_xent._types import Tensor
from keras_xent.kernels._dtypes import dtype_of, to_tensor, upcast
from keras_xent.kernels._masking import both
from keras_xent.kernels._shapes import align_weights, squeeze_class_axis
from keras_xent.kernels.probabilities import are_distributions, log_odds, log_probabilities
from keras_xent.layers.fuse_head import computes_as, has_own_call, output_layer
from keras_xent.layers.logits_dense import LogitsDense, dense_head
from keras_xent.layers.tied_logits import TiedLogits, embedding_head
from keras_xent.provenance import Head

_HEADS = (keras.layers.Dense, keras.layers.ReversibleEmbedding, LogitsDense, TiedLogits)
_ACTIVATIONS = (None, keras.activations.linear, keras.activations.softmax)


class Output(NamedTuple):
    """The output of a model: its head, from which logits can be computed, or the logits."""

    head: Head | None
    logits: Tensor
    # The Keras mask of the output, or None.
    mask: Tensor

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return self.logits.shape[-1] if self.head is None else self.head.num_classes

    def logits_at(self, temperature: float) -> Tensor:
        """The logits divided by a temperature."""
        # Quotients of 16-bit logits would be rounded once more.
        return self.logits if temperature == 1.0 else upcast(self.logits) / temperature

    def aligned(self, labels: Tensor, mask: Tensor = None) -> tuple[Tensor, Tensor]:
        """The labels, one for each distribution, and which of them this mask and the output's allow; None: all."""
        labels = to_tensor(labels, "labels")
        labels = squeeze_class_axis(labels, self._rows, -1, num_classes=self.num_classes)
        return labels, self.valid(mask, labels)

    def valid(self, mask: Tensor, labels: Tensor = None) -> Tensor:
        """Which tokens this mask and the output's allow, in the shape of the labels; None: all."""
        like = self._rows[..., 0] if labels is None else labels
        valid = None
        for one in (mask, self.mask):
            if one is not None:
                one = align_weights(one, like.shape, "mask", like=like)
                valid = both(valid, ops.broadcast_to(one, ops.shape(like)))
        return valid

    @property
    def _rows(self):
        return self.logits if self.head is None else self.head.hidden


def output_of_classes(model: Any, x: Any, training: bool | None = None) -> Output:
    """The output of `call_without_logits`, if it has a number for each class."""
    output = call_without_logits(model, as_inputs(x), training)
    if output.num_classes == 1:
        raise ValueError(
            "`model` must return a number for each class. Received: one unit, of a yes-or-no answer. Give a model with "
            "two units, or use the binary loss."
        )
    return output


def as_inputs(x: Any) -> Any:
    """The inputs of a model; lists of numbers are an array, not as many inputs."""
    are_numbers = isinstance(x, (list, tuple)) and all(isinstance(one, (int, float)) for one in keras.tree.flatten(x))
    return to_tensor(x) if are_numbers else x


def call_without_logits(model: Any, x: Any, training: bool | None = None) -> Output:
    """The model's output, as a head wherever its output layer is a `Dense` or a `ReversibleEmbedding`.

    Of a Functional or Sequential model the output layer is known. A subclassed model has to return what a `LogitsDense`
    or `TiedLogits` layer gave it, itself. Raises a ValueError where the model has several outputs, or is none.
    """
    if not isinstance(model, keras.Layer):
        raise ValueError(f"`model` must be a Keras model. Received: {model!r}.")

    def output():
        return _only_output(model, model(x, training=training))

    layer = output_layer(model, as_called=True)
    layers = [one for one in _keras.all_layers(model) if _is_logits_layer(one)] if layer is None else [layer]
    if not (layers and _is_head(layers[0])):
        return _of_predictions(model, output())
    state = [] if is_traced() else _state_of(model)
    with _heads_of(layers, model) as found:
        try:
            returned = output()
        except Exception:  # What comes after the head did not expect a stand-in; the call below tells the truth.
            if not any(call.is_stand_in for call in found):
                raise
            returned = None
    if returned is not None and _is_output(model, found, returned, is_known=layer is not None):
        return Output(found[0].head, None, _keras.mask_of(returned))
    if any(call.is_stand_in for call in found):
        for variable, value in state:
            variable.assign(value)
        returned = output()
    return _of_predictions(model, returned)


def _state_of(model):
    """What a call may change, such as averages of batches and seeds, and its values now."""
    values = [(variable, snapshot(variable)) for variable in model.non_trainable_variables]
    # Within a layer of mixed precision, weights are read in 16 bits.
    return [(variable, value) for variable, value in values if dtype_of(value) == variable.dtype]


def _of_predictions(model, predictions):
    logits = _logits_of(model, predictions)
    return Output(None if is_eager(logits) else provenance.head_of(logits), logits, _keras.mask_of(predictions))


def _logits_of(model, predictions):
    """The predictions, or the logits before the softmax that has made them."""
    expected = "sigmoid" if len(predictions.shape) == 1 or predictions.shape[-1] == 1 else "softmax"
    activation, logits = provenance.activation_and_logits(predictions, expected)
    if activation is None:
        activation = _ending_without_provenance(model, predictions)
    if activation == "sigmoid" != expected:
        raise ValueError(
            "`model` must return logits, or a softmax of them. Received: a sigmoid of "
            f"{predictions.shape[-1]} units, whose probabilities are those of independent labels, not of classes."
        )
    if activation != expected:
        return predictions
    if logits is not None:
        return logits
    if activation == "sigmoid":
        return log_odds(predictions)
    return log_probabilities(predictions, is_clipped=False)


def _ending_without_provenance(model, predictions):
    """The activation that a model ends in, where its output does not tell: what JAX traces has no logits attached."""
    if is_eager(predictions):
        is_softmax = len(predictions.shape) > 1 and are_distributions(predictions)
        return "softmax" if is_softmax else None
    outputs = [] if has_own_call(model) else getattr(model, "outputs", None) or []
    end = _endings.ending_of(outputs[0]) if len(outputs) == 1 else traced_ending(predictions)
    return None if end is None else end[1]


def _only_output(model, returned):
    outputs = keras.tree.flatten(returned)
    if len(outputs) != 1:
        raise ValueError(
            f"`model` must have one output, the logits. Received: model '{model.name}' with {len(outputs)} outputs. "
            "Give a model of that one: `keras.Model(model.inputs, model.outputs[0])`, or a subclass whose `call` "
            "returns it alone."
        )
    return outputs[0]


def _is_logits_layer(layer):
    return getattr(layer, "carries_provenance", False) and _is_head(layer)


def _is_head(layer):
    is_plain = any(computes_as(layer, kind) for kind in _HEADS) and not getattr(layer, "quantization_mode", None)
    return is_plain and getattr(layer, "activation", None) in _ACTIVATIONS


class _Call(NamedTuple):
    """A call of an output layer: its head, and what it returned."""

    head: Head
    output: Tensor
    is_stand_in: bool
    # How many losses the model had added before.
    num_losses: int


# The model whose layer it is, and where the calls of the layer are to be noted, by the identity of the layer: in this
# thread, and only inside `_heads_of`.
_wanted: contextvars.ContextVar[dict[int, tuple[Any, list[_Call]]]] = contextvars.ContextVar("_wanted")
# In how many threads each layer has `_call_or_stand_in` for its `call`, and the `call` of its own that it had before.
_lock = threading.Lock()
_uses: Counter[int] = Counter()
_own_calls: dict[int, Any] = {}


@contextlib.contextmanager
def _heads_of(layers: list, model: Any) -> Iterator[list[_Call]]:
    """Makes each layer return a stand-in for its logits, in this thread; yields a list of the calls.

    In a program it returns the logits, which are not computed unless something reads them: the program may be one that
    a function of the model keeps. Other threads that call the same layers meanwhile get their logits.
    """
    found: list[_Call] = []
    token = _wanted.set({**_wanted.get({}), **{id(layer): (model, found) for layer in layers}})
    for layer in layers:
        _replace_call(layer)
    try:
        yield found
    finally:
        for layer in layers:
            _restore_call(layer)
        _wanted.reset(token)


def _replace_call(layer):
    with _lock:
        if not _uses[id(layer)]:
            _own_calls[id(layer)] = replace_own(layer, "call", _call_or_stand_in(layer, layer.call))
        _uses[id(layer)] += 1


def _restore_call(layer):
    with _lock:
        _uses[id(layer)] -= 1
        if not _uses[id(layer)]:
            del _uses[id(layer)]
            restore_own(layer, "call", _own_calls.pop(id(layer)))


def _call_or_stand_in(layer, call):
    is_embedding = isinstance(layer, keras.layers.ReversibleEmbedding)

    def call_or_stand_in(inputs, *args, **kwargs):
        model, found = _wanted.get({}).get(id(layer), (None, None))
        if found is None or (is_embedding and not (kwargs.get("reverse") or (args and args[0]))):
            return call(inputs, *args, **kwargs)
        head = (embedding_head if is_embedding else dense_head)(layer, inputs)
        if is_traced():
            found.append(_Call(head, call(inputs, *args, **kwargs), is_stand_in=False, num_losses=0))
        else:
            # Two numbers for each token, of which nothing is computed: Keras warns of a softmax of one.
            stand_in = ops.zeros((*ops.shape(inputs)[:-1], 2), inputs.dtype)
            found.append(_Call(head, stand_in, is_stand_in=True, num_losses=_num_losses(model)))
        return found[-1].output

    return call_or_stand_in


def _is_output(model, found, returned, *, is_known):
    """Whether these calls are one, whose logits are the output, and from whose stand-in nothing else was computed.

    Of several the later ones may have got what was computed from the stand-in of an earlier one. A loss that the model
    has added since may be one of the stand-in. `is_known` says that the layer is known to make the output.
    """
    if len(found) != 1 or not (is_known or found[0].output is returned):
        return False
    (call,) = found
    # Of a function of the model that is a program of its own, the head is known inside of it only.
    return not call.is_stand_in if is_traced() else call.is_stand_in and call.num_losses == _num_losses(model)


def _num_losses(model):
    scope = _keras.stateless_scope()
    return len(model.losses if scope is None else scope.losses)
