"""Attributes of other libraries on what JAX traces: tracers take none, and other tensors do."""

from collections.abc import Callable
from typing import Any

import jax

from keras_xent._backend._attributes import get_attribute, set_attribute
from keras_xent._types import Tensor


def let_tracers_keep(name: str, note: Callable[[], Any]) -> None:
    """Lets tracers keep an attribute of this name, from now on in this process, and beside it what `note` returns.

    It is a property of their class (JAX 0.10; `set_attribute` has the reason that it is kept in a table).
    """
    kept = _kept_as(name)

    def get(tracer: Tensor) -> Any:
        return (get_attribute(tracer, kept) or (None,))[0]

    def leave(tracer: Tensor, value: Any) -> None:
        set_attribute(tracer, kept, (value, note()))

    setattr(jax.core.Tracer, name, property(get, leave))


def note_beside(tensor: Tensor, name: str) -> Any:
    """What was noted when a traced tensor got its attribute of this name, or None."""
    return (get_attribute(tensor, _kept_as(name)) or (None, None))[1]


def _kept_as(name):
    return f"_keras_xent{name}"
