"""A dense output layer whose logits carry their provenance."""

from typing import Any

import keras
from keras import ops

from keras_xent import arguments, provenance
from keras_xent._backend import snapshot
from keras_xent.layers._heads import HeadLayer, head_of, weights_of
from keras_xent.layers._plain_files import entry_of
from keras_xent.layers._quantized import dequantized, has_matrix, quantized_head, with_projections
from keras_xent.layers.vocabulary_layout import must_divide


@keras.saving.register_keras_serializable(package="keras_xent")
class LogitsDense(HeadLayer, keras.layers.Dense):
    """`keras.layers.Dense` for the last layer of a model with many classes.

    It returns ordinary logits and attaches to them the hidden states, kernel and bias that they are computed from. A
    sparse loss of this package computes the loss from these in chunks (`kernels.linear_cross_entropy`); in a compiled
    step nothing else reads the logits, so that they are never stored as a whole. To `predict`, `save`, `export` and
    other metrics it is a `Dense` layer.

    Formula: `inputs @ kernel + bias`, then the activation. Without an activation, and with a softmax, the logits keep
    their provenance.

    Args:
        units: number of classes.
        chunk_bytes: the most memory that a chunk of logits may take in a loss or metric that goes without the rest of
            them; None: chosen, as `kernels.linear_cross_entropy` says.
        **kwargs: the other arguments of `keras.layers.Dense`.

    Call arguments: `inputs` `[..., D]`. Returns logits `[..., units]` of the layer's compute dtype.

    Raises:
        ValueError: a number of classes that a layout map cannot divide evenly.

    Example:

    >>> import keras
    >>> import keras_xent as kx
    >>> model = keras.Sequential([keras.layers.Embedding(100, 8), kx.layers.LogitsDense(100)])
    >>> model.compile("adam", loss=kx.losses.MaskedSequenceCrossentropy())

    References: arXiv:2411.09009, section 2, on the memory of logits.
    """

    def __init__(self, units: int, *args: Any, chunk_bytes: int | None = None, **kwargs: Any) -> None:
        super().__init__(units, *args, **kwargs)
        self.chunk_bytes = None if chunk_bytes is None else arguments.count("chunk_bytes", chunk_bytes)

    def build(self, input_shape: Any) -> None:
        """Makes the weights."""
        must_divide("units", self, "kernel", 1, self.units)
        super().build(input_shape)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Logits with their provenance attached."""
        return call_dense(self, inputs, training)

    def load_own_variables(self, store: Any) -> None:
        """Reads the weights, also from a file of a model with a `Dense` in the place of this layer."""
        super().load_own_variables(entry_of(self, LogitsDense, keras.layers.Dense, "dense", store))

    def quantized_call(self, inputs: Any, training: bool | None = None) -> Any:
        """Logits of the quantized weights."""
        return call_quantized_dense(self, inputs, training)


def call_dense(layer: Any, inputs: Any, training: bool | None = None) -> Any:
    """Calls a `Dense` layer, and attaches the provenance of its logits."""
    head = dense_head(layer, inputs, training)
    # A compiled step that computes the loss from the head drops all of this.
    logits = ops.matmul(inputs, head.kernel if head.low_rank is None else snapshot(layer.kernel))
    if head.bias is not None:
        logits = ops.add(logits, head.bias)
    provenance.attach(logits, head)
    return logits if layer.activation is None else layer.activation(logits)


def dense_head(layer: Any, inputs: Any, training: Any = None) -> provenance.Head:
    """Returns the inputs of the logits of a `Dense` layer."""
    kernel, factors, trained = weights_of(layer, "kernel")
    matrices = {"kernel": snapshot(kernel), "bias": layer.bias, "low_rank": factors}
    return head_of(layer, training, trained, hidden=inputs, **matrices)


def call_quantized_dense(layer: Any, inputs: Any, training: bool | None = None) -> Any:
    """Calls a quantized `Dense` layer, and attaches the provenance of its logits, or why a loss has to read them."""
    logits = keras.layers.Dense.quantized_call(layer, inputs, training=training)
    if has_matrix(layer) and layer.activation in (None, keras.activations.linear):
        provenance.attach(logits, _quantized_dense_head(layer, inputs, training))
    else:
        provenance.mark_materialized(logits, layer.name, f"is quantized ({layer.quantization_mode})")
    return logits


def _quantized_dense_head(layer, inputs, training):
    zero = getattr(layer, "kernel_zero", None)
    weights, factors, _ = weights_of(layer, "kernel")
    # With groups of features Keras multiplies floats.
    rounds_inputs = zero is None
    if factors is not None:
        weights = _unpacked(layer, weights)
        if rounds_inputs:
            weights = ops.pad(ops.convert_to_tensor(weights), ((0, layer.lora_rank), (0, 0)))
    kernel = dequantized(weights, layer.kernel_scale, zero, getattr(layer, "g_idx", None), axis=0)
    head = quantized_head(layer, inputs, training, kernel, rounds_inputs=rounds_inputs, bias=layer.bias)
    if factors is None:
        return head
    if rounds_inputs:
        return with_projections(head, inputs, factors)
    return head._replace(low_rank=factors, gradients=(*head.gradients, "low_rank"))


def _unpacked(layer, weights):
    """The integers of a layer with LoRA, one to a place."""
    if layer.quantization_mode == "int8":
        return weights
    features = layer.lora_kernel_a.shape[0]
    # Two classes share a byte; before Keras 3.15 two features.
    length, axis = (layer.units, -1) if weights.shape[0] == features else (features, 0)
    return keras.quantizers.unpack_int4(ops.convert_to_tensor(weights), length, axis=axis)
