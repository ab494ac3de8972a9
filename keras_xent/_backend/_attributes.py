"""Attributes of tensors, also of JAX tracers, which take none: these are kept in a table by the tensor's identity."""

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


def get_attribute(tensor: Tensor, name: str) -> Any:
    """The value that was attached to this tensor, or None."""
    if id(tensor) in _table:
        return _table[id(tensor)].get(name)
    return getattr(tensor, name, None)
