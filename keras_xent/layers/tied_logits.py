"""An embedding that is also the output layer, and whose logits carry their provenance."""

from typing import Any

import keras
from keras import ops

from keras_xent import _keras, arguments, provenance
from keras_xent._backend import snapshot
from keras_xent.kernels._dtypes import is_float
from keras_xent.layers._heads import HeadLayer, head_of, weights_of
from keras_xent.layers._plain_files import entry_of
from keras_xent.layers._quantized import dequantized, has_matrix, quantized_head
from keras_xent.layers.vocabulary_layout import must_divide


@keras.saving.register_keras_serializable(package="keras_xent")
class TiedLogits(HeadLayer, keras.layers.ReversibleEmbedding):
    """`keras.layers.ReversibleEmbedding` for language models with many classes and tied embeddings.

    It returns ordinary logits and attaches to them the hidden states and embeddings that they are computed from. A
    sparse loss of this package computes the loss from these in chunks, so that a compiled training step never stores
    all logits. As in Keras, the logits have no mask, not even with `mask_zero=True`: name the padding with
    `ignore_class`.

    Formula: with `reverse=True`, `inputs @ transpose(embeddings)`, or `inputs @ reverse_embeddings` if the weights are
    not tied; soft-capped with `logit_soft_cap`.

    Args:
        input_dim: number of classes (the vocabulary).
        output_dim: number of features.
        chunk_bytes: the most memory that a chunk of logits may take in a loss or metric that goes without the rest of
            them; None: chosen, as `kernels.linear_cross_entropy` says.
        **kwargs: the other arguments of `keras.layers.ReversibleEmbedding`.

    Call arguments: `inputs` `[...]` integers, or `[..., D]` with `reverse=True`. Returns embeddings, or logits
    `[..., input_dim]`.

    Raises:
        ValueError: a number of classes that a layout map cannot divide evenly.

    Example:

    >>> import keras
    >>> import keras_xent as kx
    >>> embedding = kx.layers.TiedLogits(100, 8)
    >>> tokens = keras.Input((None,), dtype="int32")
    >>> model = keras.Model(tokens, embedding(embedding(tokens), reverse=True))
    >>> model.compile("adam", loss=kx.losses.MaskedSequenceCrossentropy())

    References: tied weights, arXiv:1608.05859.
    """

    def __init__(
        self, input_dim: int, output_dim: int, *args: Any, chunk_bytes: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(input_dim, output_dim, *args, **kwargs)
        self.chunk_bytes = None if chunk_bytes is None else arguments.count("chunk_bytes", chunk_bytes)

    def build(self, input_shape: Any = None) -> None:
        """Makes the weights."""
        must_divide("input_dim", self, "embeddings", 0, self.input_dim)
        super().build(input_shape)

    def call(self, inputs: Any, reverse: bool = False, training: bool | None = None) -> Any:
        """Embeddings, or logits with their provenance attached."""
        return _call(self, inputs, reverse, training)

    def load_own_variables(self, store: Any) -> None:
        """Reads the weights, also from a file of a model with a `ReversibleEmbedding` in the place of this layer."""
        plain = keras.layers.ReversibleEmbedding
        super().load_own_variables(entry_of(self, TiedLogits, plain, "reversible_embedding", store))

    def quantized_call(self, inputs: Any, reverse: bool = False, training: bool | None = None) -> Any:
        """Embeddings, or logits, of the quantized weights."""
        return call_quantized_embedding(self, inputs, reverse)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """The mask of embeddings, none of logits: Keras 3.12 would look for padding in the hidden states."""
        return None if is_float(inputs) else super().compute_mask(inputs, mask)


def call_embedding(layer: Any, inputs: Any, reverse: bool = False) -> Any:
    """Calls a `ReversibleEmbedding`, and attaches the provenance of its logits."""
    return _call(layer, inputs, reverse, _keras.is_training_step() if reverse else None)


def _call(layer, inputs, reverse, training):
    logits = keras.layers.ReversibleEmbedding.call(layer, inputs, reverse=reverse)
    if not reverse:
        return logits
    provenance.attach(logits, embedding_head(layer, inputs, training))
    return logits


def embedding_head(layer: Any, inputs: Any, training: Any = None) -> provenance.Head:
    """Returns the inputs of the logits of a `ReversibleEmbedding`."""
    weights, factors, trained = weights_of(layer, "embeddings" if layer.tie_weights else "reverse_embeddings")
    kernel = snapshot(weights)
    if layer.reverse_dtype is not None:
        inputs, kernel = ops.cast(inputs, layer.reverse_dtype), ops.cast(kernel, layer.reverse_dtype)
    return head_of(
        layer,
        training,
        trained,
        hidden=inputs,
        kernel=kernel,
        transpose_kernel=layer.tie_weights,
        logit_softcap=layer.logit_soft_cap,
        low_rank=factors,
    )


def call_quantized_embedding(layer: Any, inputs: Any, reverse: bool = False) -> Any:
    """Calls a quantized `ReversibleEmbedding`, and attaches the provenance of its logits, as of a `Dense` layer."""
    outputs = keras.layers.ReversibleEmbedding.quantized_call(layer, inputs, reverse=reverse)
    if not reverse:
        return outputs
    if has_matrix(layer):
        head = quantized_head(
            layer,
            inputs,
            _keras.is_training_step(),
            _dequantized_kernel(layer),
            transpose_kernel=layer.tie_weights,
            logit_softcap=layer.logit_soft_cap,
        )
        provenance.attach(outputs, head)
    else:
        provenance.mark_materialized(outputs, layer.name, f"is quantized ({layer.quantization_mode})")
    return outputs


def _dequantized_kernel(layer):
    """`[V, D]` of tied weights, `[D, V]` of others."""
    groups = getattr(layer, "g_idx", None)
    if layer.tie_weights:
        zero = getattr(layer, "embeddings_zero", None)
        # Keras leaves LoRA out of the logits of quantized embeddings.
        weights, factors, _ = weights_of(layer, "embeddings")
        if factors is not None and layer.quantization_mode == "int4":
            weights = keras.quantizers.unpack_int4(ops.convert_to_tensor(weights), layer.output_dim, axis=-1)
        return dequantized(weights, layer.embeddings_scale, zero, groups, axis=1)
    weights = layer.reverse_embeddings
    if layer.quantization_mode == "int4":
        weights = keras.quantizers.unpack_int4(ops.convert_to_tensor(weights), layer.output_dim, axis=0)
    zero = getattr(layer, "reverse_embeddings_zero", None)
    return dequantized(weights, layer.reverse_embeddings_scale, zero, groups, axis=0)
