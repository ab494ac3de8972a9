"""Everything here is private to Keras, or reads Keras' own stack frames: the one file to look at when Keras changes.

Written for Keras 3.12 to 3.15. Each function names what it replaces, so that it can go when Keras makes it public.
"""

import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
from keras.src.backend.common.stateless_scope import get_stateless_scope

from keras_xent._types import Tensor

_FRAMEWORKS = ("keras_xent", "keras", "tensorflow", "jax")


def mask_of(tensor: Tensor) -> Tensor:
    """The mask that Keras left on a tensor (`_keras_mask`), or None."""
    return keras.src.backend.get_keras_mask(tensor)


def logits_of(tensor: Tensor) -> Tensor:
    """The logits that a Keras activation left on its output (`_keras_logits`), or None."""
    return getattr(tensor, "_keras_logits", None)


def stateless_scope() -> Any:
    """The scope in which JAX runs a step of Keras (`get_stateless_scope`), or None."""
    return get_stateless_scope()


class Producer(NamedTuple):
    """The layer that made a symbolic tensor, and the layer's input in that call."""

    layer: Any
    input: Any


def producer(tensor: Any) -> Producer:
    """What made a symbolic tensor of Keras (`_keras_history`, `_inbound_nodes`)."""
    history = tensor._keras_history
    tensors = history.operation._inbound_nodes[history.node_index].input_tensors
    return Producer(history.operation, tensors[0] if tensors else None)


def all_layers(model: Any, *, include_self: bool = True) -> Iterator[Any]:
    """A model's layers, those inside of layers included (`_flatten_layers`)."""
    return model._flatten_layers(include_self=include_self)


def set_direction(metric: Any, direction: str) -> None:
    """Tells EarlyStopping and ModelCheckpoint whether "up" or "down" is better (`_direction`)."""
    metric._direction = direction


def batches_seen(optimizer: Any) -> Any:
    """The variable in which an optimizer counts batches (`_iterations`), also under gradient accumulation; or None."""
    return getattr(optimizer, "_iterations", getattr(optimizer, "iterations", None))


def model_of_step() -> Any:
    """The Keras model whose `fit` or `evaluate` calls this, or None.

    Only frames of Keras' trainers are looked into: reading the variables of a user's frame would keep them alive.
    """
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("keras.src.") and "self" in frame.f_code.co_varnames:
            model = frame.f_locals.get("self")
            if isinstance(model, keras.Model):
                return model
        frame = frame.f_back
    return None


def stacklevel_of_user() -> int:
    """The `stacklevel` with which the caller's `warnings.warn` names the line of the user's own program."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] in _FRAMEWORKS:
        level, frame = level + 1, frame.f_back
    return level
