"""Attributes of tensors and other objects. JAX tracers take none: theirs are kept in a table by identity."""

import weakref
from typing import Any

from keras_xent._types import Tensor

_table: dict[int, dict[str, Any]] = {}


def set_attribute(tensor: Tensor, name: str, value: Any) -> None:
    """Attaches a value to a tensor for as long as the tensor lives."""
    try:
        setattr(tensor, name, value)
    except AttributeError:
        if id(tensor) not in _table:
            weakref.finalize(tensor, _table.pop, id(tensor), None)
        _table.setdefault(id(tensor), {})[name] = value


def replace_own(owner: Any, name: str, value: Any) -> Any:
    """Sets an attribute of an object of Keras past its tracking; returns what `restore_own` sets again."""
    before = vars(owner).get(name)
    object.__setattr__(owner, name, value)
    return before


def restore_own(owner: Any, name: str, before: Any) -> None:
    """Undoes `replace_own`: None, where the attribute was its class's, removes the object's own."""
    if before is None:
        object.__delattr__(owner, name)
    else:
        object.__setattr__(owner, name, before)


def get_attribute(tensor: Tensor, name: str) -> Any:
    """The value that was attached to this tensor, or None."""
    if id(tensor) in _table:
        return _table[id(tensor)].get(name)
    return getattr(tensor, name, None)
