"""The linear kernel against its three matmuls alone, and against the logits made, on the CPU of TensorFlow."""

from collections.abc import Iterator

import tensorflow as tf

import keras_xent
from tools.bench import timing

TOKENS, FEATURES, CLASSES = 8192, 256, 32_000
VALID = 0.15


def measure(rounds: int) -> Iterator[dict]:
    """One record: milliseconds by what is done."""
    hidden = tf.random.stateless_normal([TOKENS, FEATURES], [1, 2])
    kernel = 0.1 * tf.random.stateless_normal([FEATURES, CLASSES], [3, 4])
    labels = tf.random.stateless_uniform([TOKENS], [5, 6], 0, CLASSES, tf.int32)
    valid = tf.random.stateless_uniform([TOKENS], [7, 8]) < VALID
    linear = keras_xent.kernels.linear_cross_entropy

    def with_gradient(loss):
        def step():
            with tf.GradientTape() as tape:
                tape.watch([hidden, kernel])
                value = loss()
            for_hidden, for_kernel = tape.gradient(value, [hidden, kernel])
            # All three, or TensorFlow would leave out what nobody asks for.
            return for_hidden + for_kernel[0, 0] + value

        return step

    def three_matmuls():
        # The second waits for the first, so that they are made one after the other, as in a loss.
        logits = hidden @ kernel
        for_hidden = tf.matmul(logits, kernel, transpose_b=True)
        for_kernel = tf.matmul(hidden, logits, transpose_a=True)
        return for_hidden + for_kernel[0, 0]

    def dense():
        return keras_xent.kernels.sparse_softmax_cross_entropy(labels, hidden @ kernel)

    def mean(**options):
        return lambda: linear(hidden, kernel, labels, reduction="token_mean", **options)

    calls = {
        "ours": tf.function(with_gradient(mean()), autograph=False),
        "ours, 15 % valid": tf.function(with_gradient(mean(mask=valid)), autograph=False),
        "ours, none reduced": tf.function(
            with_gradient(lambda: tf.reduce_sum(linear(hidden, kernel, labels))), autograph=False
        ),
        "logits and ours, XLA": tf.function(
            with_gradient(lambda: tf.reduce_mean(dense())), autograph=False, jit_compile=True
        ),
        "evaluate": tf.function(lambda: mean(training=False)()[None, None], autograph=False),
        "evaluate, logits": tf.function(lambda: tf.reduce_mean(dense())[None, None], autograph=False, jit_compile=True),
        "three matmuls": tf.function(three_matmuls, autograph=False),
    }
    shape = {"rows": TOKENS, "classes": CLASSES}
    yield {
        "row": f"linear, D {FEATURES}",
        "shape": shape,
        "dtype": "float32",
        "milliseconds": timing.in_turn(calls, rounds),
    }
