"""Lengths in bytes of the texts of a tokenizer's tokens."""

import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

Alphabet = Literal["auto", "byte_level", "sentencepiece", "wordpiece", "bpe_end_of_word", "plain"]

# The alphabet of GPT-2: bytes that are printable in Latin-1 stand for themselves, and the other 68 are numbered from
# U+0100 on.
_BYTE_CHARACTERS = frozenset(map(chr, [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144)]))
_BYTE_SPACE, _PIECE_SPACE, _END_OF_WORD = "\u0120", "\u2581", "</w>"
_PIECE_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


def bytes_of_tokens(
    vocabulary: Any, special: Iterable[str] = (), *, alphabet: Alphabet = "auto", added: Iterable[str] = ()
) -> list[int]:
    """Returns the number of bytes of text that each entry of a tokenizer's vocabulary stands for.

    Use it for the `bytes_per_token` of `BitsPerByte`. Each token is read by itself in the `alphabet`, which is how the
    tokenizer writes text into its vocabulary:

    - `"byte_level"` (GPT-2, RoBERTa, Llama 3): each character is one byte. A token with any other character, such as
      a run of raw spaces, was added to the vocabulary as plain text, and counts as that.
    - `"sentencepiece"` (T5, Llama 2, Gemma): U+2581 is a space, `<0x0A>` is one byte.
    - `"wordpiece"` (BERT): `##` continues a word, and stands for no text.
    - `"bpe_end_of_word"` (GPT-1, CLIP): `</w>` ends a word, and stands for no text.
    - `"plain"`: tokens are text.

    WordPiece and `</w>` do not record where the text has spaces. Their numbers leave spaces out, so that bits per byte
    come out too high: `"auto"` refuses these two.

    Args:
        vocabulary: a dict from token to number, such as `tokenizer.get_vocab()` gives, or the tokens in order.
        special: tokens that stand for no text, such as `"[PAD]"`.
        alphabet: one of those above; `"auto"` decides by the tokens that begin with U+0120 or `##`, begin or end with
            U+2581, or end with `</w>`.
        added: tokens that were added to the vocabulary as plain text, as `tokenizer.get_added_vocab()` lists them.
            They have to be stated only if they could be read in the alphabet too (`"\u00e9"` in a byte-level one).

    Returns:
        A list with one number for each token.

    Raises:
        ValueError: numbers with a gap, an unknown alphabet, or one that the tokens do not show.

    Example:

    >>> from keras_xent.metrics import bytes_of_tokens
    >>> bytes_of_tokens({"<s>": 0, "\u2581the": 1, "<0x0A>": 2, "\u20ac": 3}, special=["<s>"])
    [0, 4, 1, 3]
    >>> bytes_of_tokens(["play", "##ing"], alphabet="wordpiece")
    [4, 3]

    References: byte alphabet, https://github.com/openai/gpt-2 (`bytes_to_unicode`); SentencePiece, arXiv:1808.06226.
    """
    if alphabet not in get_args(Alphabet):
        names = ", ".join(map(repr, get_args(Alphabet)))
        raise ValueError(f"`alphabet` must be one of {names}. Received: alphabet={alphabet!r}.")
    tokens = _in_order(vocabulary)
    # A string is one token, and not the set of its characters.
    special, added = ({names} if isinstance(names, str) else set(names) for names in (special, added))
    in_alphabet = [token for token in tokens if token not in special and token not in added]
    alphabet = _detect(in_alphabet) if alphabet == "auto" else alphabet
    # CLIP writes bytes as characters in front of the `</w>`, GPT-1 text.
    in_bytes = alphabet == "bpe_end_of_word" and _BYTE_CHARACTERS.issubset(in_alphabet)
    length = _end_of_word_byte_length if in_bytes else _LENGTHS[alphabet]
    return [0 if t in special else plain_length(t) if t in added else length(t) for t in tokens]


def _in_order(vocabulary):
    if not isinstance(vocabulary, dict):
        return list(vocabulary)
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    if sorted(vocabulary.values()) != list(range(len(tokens))):
        raise ValueError(
            "`vocabulary` must number its tokens from 0 without a gap. "
            f"Received: {len(tokens)} tokens with numbers up to {max(vocabulary.values())}."
        )
    return tokens


def plain_length(token: str) -> int:
    """Bytes of a token that is text."""
    return len(token.encode())


def byte_level_length(token: str) -> int:
    """Bytes of a token of byte-level BPE, or of one that was added to its vocabulary."""
    return len(token) if _BYTE_CHARACTERS.issuperset(token) else plain_length(token)


def sentencepiece_length(token: str) -> int:
    """Bytes of a piece of SentencePiece."""
    return 1 if _PIECE_BYTE.fullmatch(token) else plain_length(token.replace(_PIECE_SPACE, " "))


def _wordpiece_length(token):
    return plain_length(token[2:] if _continues_word(token) else token)


def _end_of_word_length(token):
    return plain_length(token.removesuffix(_END_OF_WORD))


def _end_of_word_byte_length(token):
    return byte_level_length(token.removesuffix(_END_OF_WORD))


_LENGTHS: dict[str, Callable[[str], int]] = {
    "byte_level": byte_level_length,
    "sentencepiece": sentencepiece_length,
    "wordpiece": _wordpiece_length,
    "bpe_end_of_word": _end_of_word_length,
    "plain": plain_length,
}


def _continues_word(token):
    return token.startswith("##") and token.strip("#") != ""


# What a token looks like that only one alphabet has many of.
_MARKS: dict[Any, Callable[[str], bool]] = {
    "byte_level": lambda token: token[:1] == _BYTE_SPACE and len(token) > 1,
    "sentencepiece": lambda token: _PIECE_SPACE in (token[:1], token[-1:]),
    "wordpiece": _continues_word,
    "bpe_end_of_word": lambda token: token.endswith(_END_OF_WORD) and token != _END_OF_WORD,
}


def written_alphabet(tokens: list[str]) -> str | None:
    """The alphabet that one in twenty tokens or more shows, as no list of texts would; None if there is none."""
    marked = _marked(tokens)
    most = max(marked, key=lambda alphabet: marked[alphabet])
    return most if marked[most] * 20 > len(tokens) else None


def _marked(tokens):
    return {alphabet: sum(map(is_marked, tokens)) for alphabet, is_marked in _MARKS.items()}


def _detect(tokens):
    """The alphabet that the tokens show; one that changes no count, if none is marked."""
    marked = _marked(tokens)
    shown = [alphabet for alphabet, number in marked.items() if number == max(marked.values()) > 0]
    if len(shown) == 1:
        if shown[0] in ("wordpiece", "bpe_end_of_word"):
            example = next(token for token in tokens if _MARKS[shown[0]](token))
            raise ValueError(
                f"`vocabulary` does not record where the text has spaces: it is that of {shown[0]!r}, with tokens such "
                f"as {example!r}. To count the bytes of the words alone, say alphabet={shown[0]!r}; the bits per byte "
                "of a text need the number of bytes of that text."
            )
        return shown[0]
    if not shown and _BYTE_CHARACTERS.issubset(tokens):
        return "byte_level"
    unclear = next((token for token in tokens if shown or byte_level_length(token) != plain_length(token)), None)
    if unclear is not None:
        raise ValueError(
            f"`alphabet` must be stated for this vocabulary, whose tokens, such as {unclear!r}, do not show whether "
            "their characters are text or bytes. Give alphabet='byte_level', 'sentencepiece' or 'plain'. "
            "Received: alphabet='auto'."
        )
    return "plain"
