"""Bits per byte: the cross-entropy of the text itself, whatever its tokens are."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_xent import arguments
from keras_xent._backend import no_autograph
from keras_xent._types import DType, Tensor
from keras_xent.metrics._token_mean import TokenValues
from keras_xent.metrics.byte_lengths import written_alphabet
from keras_xent.metrics.token_crossentropy import TokenCrossentropy


@keras.saving.register_keras_serializable(package="keras_xent")
class BitsPerByte(TokenCrossentropy):
    """The cross-entropy in bits for each byte of text, over all tokens since the last reset.

    To compare models with different tokenizers on the same text: their perplexities cannot be compared, since longer
    tokens are harder to predict. Tokens are left out by the Keras mask and by `ignore_class`.

    Formula: `sum_n t_n nll_n / (ln 2 sum_n t_n b_n)` over valid tokens `n` with sample weights `t_n` and `b_n` bytes.
    Without bytes: nan. A token of 0 bytes (the end of a text) adds its cross-entropy and no byte.

    Equivalent to `sum(nll) / (log(2) * sum(take(bytes_per_token, y_true)))` over one batch that holds every token.

    Args:
        bytes_per_token: for each class the number of bytes that it stands for, `[C]`; or the tokens themselves, as
            `bytes` or as `str`. `bytes_of_tokens` gives the numbers for what tokenizers write into their vocabularies.
        from_logits: whether `y_pred` holds logits or probabilities.
        ignore_class: the label of padding.
        axis: the class axis.
        name: name of the metric (default `"bits_per_byte"`).
        dtype: dtype of the result (default float32). The sums are exact to 2^48 tokens whatever it is.
        logit_softcap: the loss's `logit_softcap`, if it has one.

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
            alphabet = written_alphabet([token for token in bytes_per_token if isinstance(token, str)])
            if alphabet is not None:
                raise ValueError(
                    "`bytes_per_token` must be numbers, or tokens as they stand in a text. Received: tokens as a "
                    f"tokenizer writes them ({alphabet!r}). Give bytes_of_tokens(vocabulary)."
                )
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
