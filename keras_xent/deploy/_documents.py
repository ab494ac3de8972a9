"""Texts as tokens, and what the likelihoods of their tokens say of them."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_xent.metrics import byte_lengths


class Document(NamedTuple):
    """A text, its tokens, where each begins and ends, in characters, and for how many bytes it stands."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    sizes: list[int]


class Piece(NamedTuple):
    """A part of a text with the cross-entropy of its tokens in nats; None where none of them was scored."""

    text: str
    nll: float | None


def read(path: Any, tokenizer: Any) -> Document:
    """The text of a file and its tokens, without a byte order mark and without special tokens."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"The file is no text in UTF-8 (byte {error.start}).") from None
    if not text:
        raise ValueError("The file is empty.")
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return Document(text, encoding.ids, encoding.offsets, _sizes(text, encoding.tokens, encoding.offsets))


def _sizes(text, tokens, spans):
    """The bytes of each token, which add up to those of the text: spaces without a token go to the next one."""
    sizes: list[int] = []
    begin = first = 0
    while first < len(tokens):
        end, last = max(begin, spans[first][1]), first + 1
        # Tokens that share a character are counted together.
        while last < len(tokens) and spans[last][0] < end:
            end, last = max(end, spans[last][1]), last + 1
        part = text[begin:end] if last < len(tokens) else text[begin:]
        sizes += _shares(len(part.encode()), tokens[first:last])
        begin, first = end, last
    return sizes


def _shares(size, tokens):
    """The bytes of each of some tokens that stand for `size` bytes together; evenly, if their names do not say."""
    for length in (byte_lengths.byte_level_length, byte_lengths.sentencepiece_length):
        lengths = [length(token) for token in tokens]
        if sum(lengths) == size:
            return lengths
    share, rest = divmod(size, len(tokens))
    return [share + (i < rest) for i in range(len(tokens))]


def summary(document: Document, log_likelihood: np.ndarray) -> dict[str, Any]:
    """Returns the scores of a text as numbers that JSON can hold, None in place of an infinite one.

    Bits per byte are those of the bytes that the scored tokens stand for.
    """
    scored = ~np.isnan(log_likelihood)
    if not scored.any():
        raise ValueError(
            f"The file has {len(document.ids)} token(s), and none that comes after another. "
            "Export the model with a `start_token`, if it was trained with one."
        )
    size = int(np.array(document.sizes)[scored].sum())
    return totals(int(scored.sum()), size, float(log_likelihood[scored].sum()))


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
