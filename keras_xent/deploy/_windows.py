"""Windows into a document that is longer than the context of its model."""

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """A part of a document that is scored at once: `ids[begin:end]`, of which those from `first_scored` on are new."""

    begin: int
    first_scored: int
    end: int


def windows(length: int, context: int, stride: int, first_scored: int = 1) -> Iterator[Window]:
    """Windows of at most `context + 1` tokens that score each token from `first_scored` on once.

    Example:

    >>> from keras_xent.deploy._windows import windows
    >>> [tuple(window) for window in windows(8, context=4, stride=2)]
    [(0, 1, 5), (2, 5, 7), (3, 7, 8)]
    """
    while first_scored < length:
        end = min(length, first_scored + (context if first_scored == 1 else stride))
        yield Window(max(0, end - context - 1), first_scored, end)
        first_scored = end
