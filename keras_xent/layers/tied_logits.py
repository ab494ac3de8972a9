"""An embedding that is also the output layer, and whose logits carry their provenance."""

from typing import Any

import keras
from keras import ops

from keras_xent import provenance
from keras_xent._backend import snapshot
from keras_xent.kernels._dtypes import is_float
from keras_xent.layers.vocabulary_layout import must_divide


@keras.saving.register_keras_serializable(package="keras_xent")
class TiedLogits(keras.layers.ReversibleEmbedding):
    """`keras.layers.ReversibleEmbedding` whose logits carry their provenance, as those of `LogitsDense` do.

    Formula: with `reverse=True`, `inputs @ transpose(embeddings)`, or `inputs @ reverse_embeddings` if the weights are
    not tied; soft-capped if asked.

    Args:
        input_dim: number of classes (the vocabulary).
        output_dim: number of features.
        **kwargs: the other arguments of `keras.layers.ReversibleEmbedding`.

    Call arguments: `inputs` `[...]` integers, or `[..., D]` with `reverse=True`. Returns embeddings, or logits
    `[..., input_dim]`.

    Raises:
        ValueError: a number of classes that a layout map cannot divide evenly.

    Example:

    >>> import keras_xent as kx
    >>> embedding = kx.layers.TiedLogits(100, 8)
    >>> tokens = keras.Input((None,), dtype="int32")
    >>> model = keras.Model(tokens, embedding(embedding(tokens), reverse=True))
    >>> model.compile("adam", loss=kx.losses.MaskedSequenceCrossentropy())

    References: tied weights, arXiv:1608.05859.
    """

    def build(self, input_shape: Any = None) -> None:
        """Makes the weights."""
        must_divide("input_dim", self, "embeddings", 0, self.input_dim)
        super().build(input_shape)

    def call(self, inputs: Any, reverse: bool = False, training: bool | None = None) -> Any:
        """Embeddings, or logits with their provenance attached."""
        logits = super().call(inputs, reverse=reverse)
        if not reverse:
            return logits
        weights = self.embeddings if self.tie_weights else self.reverse_embeddings
        kernel = snapshot(weights)
        if self.reverse_dtype is not None:
            inputs, kernel = ops.cast(inputs, self.reverse_dtype), ops.cast(kernel, self.reverse_dtype)
        head = provenance.Head(
            hidden=inputs,
            kernel=kernel,
            transpose_kernel=self.tie_weights,
            logit_softcap=self.logit_soft_cap,
            training=bool(training),
            gradients=("hidden", "kernel") if self.trainable_weights else ("hidden",),
            layer=self.name,
        )
        provenance.attach(logits, head)
        return logits

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """The mask of embeddings, none of logits: Keras 3.12 would look for padding in the hidden states."""
        return None if is_float(inputs) else super().compute_mask(inputs, mask)
