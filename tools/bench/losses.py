"""How a loss is called in training, by us and by the peers, and what it is called on."""

from collections.abc import Callable

import keras
import tensorflow as tf

import keras_xent
from tools.bench.shapes import Shape

CLASSES = {
    "sigmoid": "BinaryCrossentropy",
    "dense": "CategoricalCrossentropy",
    "sparse": "SparseCategoricalCrossentropy",
}


def peers(row: str) -> dict[str, Callable]:
    """Forward + backward, `(labels, logits) -> (loss, gradient)`, by the name of the peer.

    "Graph" is what `fit` makes of a model on the CPU: no `jit_compile`, and shapes that differ share a graph.
    """
    name = CLASSES[row]
    ours = getattr(keras_xent.losses, name)(from_logits=True)
    theirs = getattr(keras.losses, name)(from_logits=True)
    return {
        "ours, graph": tf.function(_step(ours), autograph=False, reduce_retracing=True),
        "ours, XLA": tf.function(_step(ours), jit_compile=True, autograph=False),
        "Keras, graph": tf.function(_step(theirs), autograph=False, reduce_retracing=True),
        "Keras, XLA": tf.function(_step(theirs), jit_compile=True, autograph=False),
    }


def _step(loss):
    def step(labels, logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            value = loss(labels, logits)
        return value, tape.gradient(value, logits)

    return step


@tf.function(autograph=False)
def inputs(row: str, shape: Shape, dtype: str) -> tuple[tf.Tensor, tf.Tensor]:
    """Random labels and logits. Targets are float32 with any logits, as in mixed precision."""
    size = shape.rows, shape.classes
    logits = tf.cast(3.0 * tf.random.stateless_normal(size, [1, 2]), dtype)
    if row == "sparse":
        return tf.random.stateless_uniform(size[:1], [3, 4], 0, shape.classes, tf.int32), logits
    if row == "sigmoid":
        return tf.round(tf.random.stateless_uniform(size, [3, 4])), logits
    return tf.nn.softmax(3.0 * tf.random.stateless_normal(size, [3, 4])), logits
