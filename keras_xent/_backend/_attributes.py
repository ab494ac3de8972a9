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


class replaced:
    """Gives an object an attribute for a while, past the tracking of Keras."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self._owner, self._name, self._value = owner, name, value

    def __enter__(self) -> Any:
        self._before = vars(self._owner).get(self._name)
        object.__setattr__(self._owner, self._name, self._value)
        return self._value

    def __exit__(self, *exception: Any) -> None:
        if self._before is None:
            object.__delattr__(self._owner, self._name)
        else:
            object.__setattr__(self._owner, self._name, self._before)
