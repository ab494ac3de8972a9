"""Everything here is private to Keras, or reads Keras' own stack frames: the one file to look at when Keras changes.

Written for Keras 3.12 to 3.15. Each function names what it replaces, so that it can go when Keras makes it public.
"""

import contextlib
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
    """The variable in which an optimizer counts batches; `iterations` counts updates. None if there is none."""
    named = [one for one in getattr(optimizer, "variables", ()) if one.name == "iteration"]
    return named[0] if named else getattr(optimizer, "iterations", None)


@contextlib.contextmanager
def training_state(model: Any) -> Iterator[None]:
    """Metrics and counters of a model in `fit`, read inside, have the values that the steps so far have given them.

    On JAX the variables are empty between two steps, and `fit` holds their values (`_jax_state`). Unlike
    `jax_state_sync` this copies nothing and leaves the state with `fit`, so that the next step stays as fast as it was.
    """
    state = getattr(model, "_jax_state", None)
    if not state or not _is_empty(model.metrics_variables[0]):
        yield
        return
    pairs = list(zip(model.metrics_variables, state.get("metrics_variables") or (), strict=False))
    if getattr(model, "optimizer", None) is not None:
        counters = zip(model.optimizer.variables, state.get("optimizer_variables") or (), strict=False)
        # The rest are moments of the weights.
        pairs += [(variable, value) for variable, value in counters if not variable.shape]
    with keras.StatelessScope(state_mapping=pairs):
        yield


def _is_empty(variable):
    try:
        return variable.value is None
    except TypeError:
        # It would call its initializer, which it had when it was built.
        return True


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
