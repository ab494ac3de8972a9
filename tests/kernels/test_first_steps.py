"""In programs of XLA a new number of rows is compiled, and is traced only around the kernels."""

import numpy as np
import pytest

from keras_xent import kernels
from tests import internals
from tests.backend import BACKEND, tensor, to_numpy, value_and_gradient

if BACKEND == "tensorflow":
    import tensorflow as tf

pytestmark = pytest.mark.skipif(BACKEND == "jax", reason="JAX traces each program as a whole")

CLASSES = 5
# Fewer numbers than 256, and more: programs differ at sizes that are powers of 2.
ROWS = (40, 41, 47, 60, 63)


def example(kind, rows):
    rng = np.random.default_rng(rows)
    logits = rng.standard_normal((rows, CLASSES)).astype("float32")
    if kind == "sparse":
        return logits, rng.integers(0, CLASSES, rows).astype("int32"), kernels.sparse_softmax_cross_entropy
    labels = rng.dirichlet(np.ones(CLASSES), rows).astype("float32")
    return logits, labels, kernels.softmax_cross_entropy if kind == "dense" else kernels.sigmoid_cross_entropy


@pytest.mark.parametrize("kind", ["sparse", "dense", "sigmoid"])
def test_kernels_are_traced_once_for_many_numbers_of_rows(kind):
    internals.clear_cache()

    @tf.function(jit_compile=True, autograph=False)
    def step(labels, logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            losses = example(kind, 1)[2](labels, logits)
        return losses, tape.gradient(losses, logits)

    traces = []
    for rows in ROWS:
        logits, labels, kernel = example(kind, rows)
        losses, gradient = map(to_numpy, step(tensor(labels, labels.dtype.name), tensor(logits)))
        traces.append(internals.number_of_traces())
        value, expected = value_and_gradient(lambda x, y=labels, f=kernel: f(y, x), tensor(logits))
        np.testing.assert_allclose(losses, value, rtol=2e-6, atol=1e-7)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert traces == [1, 1, 1, 2, 2]


def test_labels_get_a_gradient_through_a_gradient_for_the_logits():
    """A tape for the logits alone, in a function that is differentiated for its targets."""
    logits, targets, kernel = example("dense", 3)

    @tf.function(jit_compile=True, autograph=False)
    def penalty(targets, logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            loss = tf.reduce_sum(kernel(targets, logits))
        return loss + tf.reduce_sum(tape.gradient(loss, logits) ** 2)

    targets, logits = tf.constant(targets), tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch(targets)
        value = penalty(targets, logits)
    log_p = tf.nn.log_softmax(tf.cast(logits, "float64"))
    p, q = tf.exp(log_p), tf.cast(targets, "float64")
    slope = tf.reduce_sum(q, axis=1, keepdims=True) * p - q
    expected = -log_p + 2 * (tf.reduce_sum(slope * p, axis=1, keepdims=True) - slope)
    np.testing.assert_allclose(tape.gradient(value, targets), expected, rtol=1e-5)
