"""Tokenizers as two functions, from text to tokens and back. What a text spells is text and no special token."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


def load_tokenizer(path: Any) -> Any:
    """The `tokenizers.Tokenizer` of a JSON file. It is data: nothing of it is run."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError("Scoring text needs the package tokenizers: pip install 'keras-xent[deploy]'.") from None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # The library raises nothing more special.
    except Exception as error:
        raise ValueError(f"'{path}' is no tokenizer of the package tokenizers ({str(error).rstrip('.')}).") from error
    return _for_text(tokenizer)


def _for_text(tokenizer):
    # What was set for training would cut and pad the texts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A text that spells "[PAD]" is text.
    tokenizer.encode_special_tokens = True
    return tokenizer


class TextTokenizer(NamedTuple):
    """Tokens of a text without special ones, and the text of tokens."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def text_tokenizer(tokenizer: Any) -> TextTokenizer:
    """The functions of a tokenizer of KerasHub, a `tokenizers.Tokenizer`, or its JSON file.

    A tokenizer of KerasHub has no switch for special tokens: those that a text spells are read as such.
    """
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(tokenizer)
    elif hasattr(tokenizer, "to_str"):
        from tokenizers import Tokenizer

        # A copy, since the caller may train with the other settings.
        tokenizer = _for_text(Tokenizer.from_str(tokenizer.to_str()))
    if hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode"):
        return TextTokenizer(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode)
    if hasattr(tokenizer, "tokenize") and hasattr(tokenizer, "detokenize"):
        return TextTokenizer(
            lambda text: [int(token) for token in np.asarray(tokenizer.tokenize(text)).reshape(-1)] if text else [],
            lambda tokens: str(tokenizer.detokenize(np.array(tokens, "int32"))) if tokens else "",
        )
    raise ValueError(
        "`tokenizer` must be one of KerasHub, a `tokenizers.Tokenizer`, or the path of its JSON file. "
        f"Received: {type(tokenizer).__name__}."
    )
