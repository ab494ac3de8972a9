"""The switch for compilation by XLA, of the process and of the current thread."""

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator

# The setting of a block of code, before that of the process.
_uses_xla: contextvars.ContextVar[bool | None] = contextvars.ContextVar("_uses_xla", default=None)
_process = {"uses_xla": os.environ.get("KERAS_XENT_USE_XLA", "1").strip().lower() not in ("0", "false", "off", "no")}
# What keeps a backend from compiling anything now; `tensorflow.py` adds to it.
obstacles: list[Callable[[], bool]] = []


@contextlib.contextmanager
def without_xla() -> Iterator[None]:
    """Kernels called inside run as plain operations: for SavedModels that are served where there is no XLA."""
    token = _uses_xla.set(False)
    try:
        yield
    finally:
        _uses_xla.reset(token)


def uses_xla() -> bool:
    """Returns whether kernels are compiled by XLA here."""
    here = _uses_xla.get()
    is_on = _process["uses_xla"] if here is None else here
    return is_on and not any(is_in_the_way() for is_in_the_way in obstacles)


def set_uses_xla(value: bool) -> None:
    """Sets whether kernels of this process are compiled by XLA."""
    _process["uses_xla"] = value
