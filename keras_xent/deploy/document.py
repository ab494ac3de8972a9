"""Texts as tokens, and what their tokens' likelihoods say of them."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Document(NamedTuple):
    """A text, its tokens, and where in the text each token begins and ends, in characters."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]


class Piece(NamedTuple):
    """A part of a text with the cross-entropy of its tokens in nats; None where none of them was scored."""

    text: str
    nll: float | None


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
    # What was set for training would cut and pad the texts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read(path: Any, tokenizer: Any) -> Document:
    """The text of a file and its tokens, without the special ones that the tokenizer would add."""
    content = Path(path).read_bytes()
    if not content:
        raise ValueError("The file is empty.")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"The file is no text in UTF-8 (byte {error.start}).") from None
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return Document(text, encoding.ids, encoding.offsets)


def summary(document: Document, log_likelihood: np.ndarray) -> dict[str, Any]:
    """What is known of a text: numbers that JSON can hold, None in the place of an infinite one.

    Bits per byte are those of the text from the first token that was scored.
    """
    scored = ~np.isnan(log_likelihood)
    if not scored.any():
        raise ValueError(
            f"The file has {len(document.ids)} token(s), and none that comes after another. "
            "Export the model with a `start_token`, if it was trained with one."
        )
    first = int(np.argmax(scored))
    begin = document.spans[first - 1][1] if first else 0
    return totals(int(scored.sum()), len(document.text[begin:].encode()), float(log_likelihood[scored].sum()))


def totals(tokens: int, size: int, log_likelihood: float) -> dict[str, Any]:
    """Likelihood of `tokens` tokens that stand for `size` bytes, in each of its units."""
    nll = -log_likelihood / tokens
    return {
        "tokens": tokens,
        "bytes": size,
        "log_likelihood": _finite(log_likelihood),
        "perplexity": _finite(float(np.exp(nll))) if nll < 709 else None,
        "bits_per_byte": _finite(-log_likelihood / math.log(2) / size) if size else None,
    }


def _finite(number):
    return number if math.isfinite(number) else None


def pieces(document: Document, log_likelihood: np.ndarray) -> list[Piece]:
    """The whole text, cut where tokens end. Tokens that share a character share a piece, and add up."""
    result: list[Piece] = []
    done = 0
    for (_, end), value in zip(document.spans, -log_likelihood, strict=True):
        nll = None if np.isnan(value) else float(value)
        if end > done:
            # From where the last token ended: a tokenizer may leave the spaces between words to none.
            result.append(Piece(document.text[done:end], nll))
            done = end
        elif result and nll is not None:
            result[-1] = Piece(result[-1].text, nll + (result[-1].nll or 0.0))
    return [*result, Piece(document.text[done:], None)] if done < len(document.text) else result
