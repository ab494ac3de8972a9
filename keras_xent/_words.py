"""Words of errors: what the public function that was called names its labels and logits, and what it advises."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple


class Words(NamedTuple):
    """The names of labels and logits in errors, and advice: on a label that marks padding, and on one-hot labels."""

    labels: str = "labels"
    logits: str = "logits"
    padding: str = "say so with `ignore_class={label}`"
    one_hot: str = "For one-hot or soft targets use the categorical loss."


# In place of the last one, where no loss is at hand.
GIVE_INDICES = "Of one-hot or soft labels give the indices: `numpy.argmax(labels, axis=-1)`."

_OF_LOSSES = Words()
_current = contextvars.ContextVar("_current", default=_OF_LOSSES)


@contextlib.contextmanager
def named(*words: str, **others: str) -> Iterator[None]:
    """Errors inside use these `Words`: the names of the arguments of the public function, and what it can do."""
    token = _current.set(Words(*words, **others))
    try:
        yield
    finally:
        _current.reset(token)


def words() -> Words:
    """The words of errors."""
    return _current.get()


def names() -> tuple[str, str]:
    """The names of labels and logits in errors."""
    return words()[:2]
