"""Whether kernels are compiled by XLA, in this thread and at this moment."""

import contextlib
import contextvars
from collections.abc import Iterator

_uses_xla = contextvars.ContextVar("_uses_xla", default=True)


@contextlib.contextmanager
def without_xla() -> Iterator[None]:
    """Kernels called inside run as plain operations: for SavedModels that are served where there is no XLA."""
    token = _uses_xla.set(False)
    try:
        yield
    finally:
        _uses_xla.reset(token)


def uses_xla() -> bool:
    """Whether kernels are compiled by XLA here."""
    return _uses_xla.get()
