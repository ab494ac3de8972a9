"""Tokens as people read them."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keras_xent import arguments

_SIGNS = {"\n": "\u23ce", "\r": "\u240d", "\t": "\u21e5"}


class TokenText:
    """The text of a token by its number.

    `decode` is a function from the number to the text, a list of texts, or a dict. A number without a text is shown.
    """

    def __init__(self, decode: Callable[[int], str] | Sequence[str] | Mapping[int, str] | None) -> None:
        self._decode, self._warned = decode, False

    def __call__(self, token: Any) -> str:
        """The text, with signs for what cannot be seen."""
        token, text = int(token), str(int(token))
        try:
            # A label that is ignored may be below 0.
            if self._decode is not None and token >= 0:
                text = str(self._decode(token) if callable(self._decode) else self._decode[token])
        except (IndexError, KeyError):
            pass
        # What the user's own function may raise is not known, and no reason to end the training.
        except Exception as error:
            if not self._warned:
                self._warned = True
                arguments.warn(f"`decode` failed for token {token}, which is shown as its number: {error!r}.")
        return "".join(map(_visible, text))


def _visible(character):
    if character in _SIGNS:
        return _SIGNS[character]
    # Controls, surrogates and the like, which no picture and no table can hold.
    return "\ufffd" if unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp") else character
