"""Bits per byte: the cross-entropy of the text itself, whatever its tokens are."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_xent import arguments
from keras_xent._backend import no_autograph
from keras_xent._types import DType, Tensor
from keras_xent.metrics._token_mean import TokenValues
from keras_xent.metrics.token_crossentropy import TokenCrossentropy

# How byte-level tokenizers write the bytes that are no printable ASCII or Latin-1 characters: from here on, in order.
_FIRST_STAND_IN, _STAND_INS = 0x100, 68
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


@keras.saving.register_keras_serializable(package="keras_xent")
class BitsPerByte(TokenCrossentropy):
    """The cross-entropy in bits for each byte of text, over all tokens since the last reset.

    Perplexities of models with different tokenizers do not compare: longer tokens are harder to predict. Bits per byte
    of the same text do. Counts tokens as `Perplexity` does.

    Formula: `sum_n t_n nll_n / (ln 2 sum_n t_n b_n)` over valid tokens `n` with sample weights `t_n` and `b_n` bytes.
    Without bytes: nan. A token of 0 bytes (the end of a text) adds its cross-entropy and no byte.

    Equivalent to `sum(nll) / (log(2) * sum(take(bytes_per_token, y_true)))` over one batch that holds every token.

    Args:
        bytes_per_token: for each class the number of bytes that it stands for, `[C]`; or the tokens themselves, as
            `bytes` or as `str`. `bytes_of_tokens` gives the numbers for what tokenizers write into their vocabularies.
        from_logits, ignore_class, axis, dtype, logit_softcap: as in `Perplexity`.
        name: name of the metric (default `"bits_per_byte"`).

    Raises:
        ValueError: numbers below 0, or not one for each class of the predictions.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> metric = kx.metrics.BitsPerByte(["a", "bcd"])
    >>> metric.update_state(np.array([[0, 1]]), np.log([[[0.25, 0.75], [0.5, 0.5]]]))
    >>> float(metric.result())  # 2 bits and 1 bit for 4 bytes
    0.75

    References: arXiv:2101.00027 (The Pile), section 3.1.
    """

    _default_name = "bits_per_byte"

    def __init__(
        self,
        bytes_per_token: Any,
        from_logits: bool = True,
        ignore_class: int | None = None,
        axis: int = -1,
        name: str | None = None,
        dtype: DType = None,
        *,
        logit_softcap: float | None = None,
    ) -> None:
        super().__init__(from_logits, ignore_class, axis, name, dtype, logit_softcap=logit_softcap)
        if isinstance(bytes_per_token, Sequence) and all(isinstance(t, str | bytes) for t in bytes_per_token):
            bytes_per_token = [len(t.encode() if isinstance(t, str) else t) for t in bytes_per_token]
        numbers = arguments.class_weights("bytes_per_token", bytes_per_token)
        if not isinstance(numbers, list):
            raise ValueError(
                "`bytes_per_token` must be a list with one number for each class, or the tokens themselves. "
                f"Received: bytes_per_token={bytes_per_token!r}."
            )
        self.bytes_per_token = numbers
        self._bytes = np.array(numbers, "float32")

    def _denominators(self, weights: Tensor, labels: Tensor) -> Tensor:
        # Tokens that are not valid may have any label.
        indices = ops.clip(ops.cast(labels, "int32"), 0, len(self._bytes) - 1)
        return weights * ops.take(self._bytes, indices)

    def _token_values(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor) -> TokenValues:
        classes = y_pred.shape[self.axis]
        if classes is not None and classes != len(self.bytes_per_token):
            raise ValueError(
                "`bytes_per_token` must have one number for each class. Received: "
                f"{len(self.bytes_per_token)} numbers and predictions of shape {tuple(y_pred.shape)}."
            )
        return super()._token_values(y_true, y_pred, sample_weight)

    @no_autograph
    def result(self) -> Tensor:
        """The bits per byte; nan without bytes."""
        return ops.cast(self._mean() / math.log(2), self.dtype)

    def get_config(self) -> dict[str, Any]:
        """Every argument of the constructor."""
        return {**super().get_config(), "bytes_per_token": self.bytes_per_token}


def bytes_of_tokens(vocabulary: Any, special: Iterable[str] = ()) -> list[int]:
    """How many bytes of text each entry of a tokenizer's vocabulary stands for.

    Knows the alphabets in which tokenizers write bytes as characters: that of byte-level BPE (GPT-2, RoBERTa, Llama 3),
    in which each character is one byte, and that of SentencePiece, with U+2581 for a space and `<0x0A>` for a byte.

    Args:
        vocabulary: a dict from token to number, such as `tokenizer.get_vocab()` gives, or the tokens in order.
        special: tokens that stand for no text, such as `"[PAD]"`.

    Example:

    >>> from keras_xent.metrics import bytes_of_tokens
    >>> bytes_of_tokens({"<s>": 0, "\u2581the": 1, "<0x0A>": 2, "\u20ac": 3}, special=["<s>"])
    [0, 4, 1, 3]

    References: byte alphabet, https://github.com/openai/gpt-2 (`bytes_to_unicode`); SentencePiece, arXiv:1808.06226.
    """
    tokens = (
        sorted(vocabulary, key=lambda token: vocabulary[token]) if isinstance(vocabulary, dict) else list(vocabulary)
    )
    if isinstance(vocabulary, dict) and sorted(vocabulary.values()) != list(range(len(tokens))):
        raise ValueError(
            "`vocabulary` must number its tokens from 0 without a gap. "
            f"Received: {len(tokens)} tokens with numbers up to {max(vocabulary.values())}."
        )
    special = set(special)
    text = [token for token in tokens if token not in special]
    spaces = any("\u2581" in token for token in text)
    byte_level = not spaces and all(_is_byte(character) for token in text for character in token)
    return [0 if t in special else len(t) if byte_level else _bytes_of_piece(t) for t in tokens]


def _is_byte(character):
    code = ord(character)
    printable = 0x21 <= code <= 0x7E or 0xA1 <= code <= 0xFF and code != 0xAD
    return printable or _FIRST_STAND_IN <= code < _FIRST_STAND_IN + _STAND_INS


def _bytes_of_piece(token):
    return 1 if _BYTE.fullmatch(token) else len(token.replace("\u2581", " ").encode())
