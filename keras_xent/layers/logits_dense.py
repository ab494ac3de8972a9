"""A dense output layer whose logits carry their provenance."""

from typing import Any

import keras
from keras import ops

from keras_xent import provenance
from keras_xent._backend import snapshot
from keras_xent.layers.vocabulary_layout import must_divide


@keras.saving.register_keras_serializable(package="keras_xent")
class LogitsDense(keras.layers.Dense):
    """`keras.layers.Dense` for the last layer of a model with many classes.

    It returns ordinary logits and attaches to them what they are computed from: hidden states, kernel and bias. A
    sparse loss of this package computes the loss from these (`kernels.linear_cross_entropy`); in a compiled step
    nothing else reads the logits, so that they are never materialized. `predict`, `save`, `export` and other metrics
    see a `Dense` layer.

    Formula: `inputs @ kernel + bias`, then the activation. Without an activation, and with a softmax, the logits keep
    their provenance.

    Args:
        units: number of classes.
        **kwargs: the other arguments of `keras.layers.Dense`.

    Call arguments: `inputs` `[..., D]`. Returns logits `[..., units]` of the layer's compute dtype.

    Raises:
        ValueError: a number of classes that a layout map cannot divide evenly.

    Example:

    >>> import keras_xent as kx
    >>> model = keras.Sequential([keras.layers.Embedding(100, 8), kx.layers.LogitsDense(100)])
    >>> model.compile("adam", loss=kx.losses.MaskedSequenceCrossentropy())

    References: arXiv:2411.09009, section 2, on the memory of logits.
    """

    def build(self, input_shape: Any) -> None:
        """Makes the weights."""
        must_divide("units", self, "kernel", 1, self.units)
        super().build(input_shape)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Logits with their provenance attached."""
        kernel = snapshot(self.kernel)
        logits = ops.matmul(inputs, kernel)
        bias = None
        if self.bias is not None:
            bias = snapshot(self.bias)
            logits = ops.add(logits, bias)
        matrices = [w for w in self.trainable_weights if w is not self.bias]
        trained = {"hidden": True, "kernel": bool(matrices), "bias": self.bias is not None and self.bias.trainable}
        head = provenance.Head(
            hidden=inputs,
            kernel=kernel,
            bias=bias,
            training=bool(training),
            gradients=tuple(name for name, is_trained in trained.items() if is_trained),
            layer=self.name,
        )
        provenance.attach(logits, head)
        return logits if self.activation is None else self.activation(logits)
