"""Heads of int8 weights: from what a loss computes their logits."""

from typing import Any

from keras import ops

from keras_xent import provenance
from keras_xent._backend import snapshot


def is_int8(layer: Any) -> bool:
    """Returns whether a loss can compute from the weights of a quantized layer: int8, without LoRA."""
    return layer.quantization_mode == "int8" and not getattr(layer, "lora_enabled", False)


def int8_head(
    layer: Any,
    inputs: Any,
    training: Any,
    kernel: Any,
    scale: Any,
    *,
    bias: Any = None,
    transpose_kernel: bool = False,
    logit_softcap: float | None = None,
) -> provenance.Head:
    """The inputs of the logits of a quantized layer; the kernel is `kernel / scale`, which is not trained."""
    hidden, trained = ops.cast(inputs, "float32"), ["hidden"]
    if layer.inputs_quantizer:
        rounded, scale_of_inputs = layer.inputs_quantizer(inputs, axis=-1)
        rounded = ops.cast(rounded, "float32") / ops.cast(scale_of_inputs, "float32")
        # As in Keras, the gradient passes the rounding of the inputs.
        hidden = hidden + ops.stop_gradient(rounded - hidden)
    if bias is not None and bias.trainable:
        trained.append("bias")
    kernel = ops.cast(snapshot(kernel), "float32") / ops.cast(snapshot(scale), "float32")
    return provenance.Head(
        hidden=hidden,
        kernel=ops.stop_gradient(kernel),
        bias=None if bias is None else snapshot(bias),
        transpose_kernel=transpose_kernel,
        logit_softcap=logit_softcap,
        training=provenance.is_training(training),
        gradients=tuple(trained),
        layer=layer.name,
        chunk_bytes=getattr(layer, "chunk_bytes", None),
    )
