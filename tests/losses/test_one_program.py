"""Derivatives of losses whose value and gradient are one program: for weights and targets, and of the gradient."""

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests.backend import BACKEND, MODES, TWO_MODES, tensor, to_numpy

ROWS, CLASSES = 6, 5
RNG = np.random.default_rng(0)
LOGITS, VECTOR = RNG.standard_normal((2, ROWS, CLASSES))
TARGETS = RNG.dirichlet(np.ones(CLASSES), ROWS)
LABELS = np.array([0, 1, 2, 3, 4, 0])
WEIGHTS = np.array([0.5, 1.0, 0.0, 2.0, 0.25, 3.0])
PROBABILITIES = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
DENSE = kx.losses.CategoricalCrossentropy(from_logits=True)
SPARSE = kx.losses.SparseCategoricalCrossentropy(from_logits=True)


def gradient(function, *inputs, wrt):
    """The gradient of a scalar function for one of its inputs."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(inputs[wrt])
            value = function(*inputs)
        return tape.gradient(value, inputs[wrt])
    import jax

    return jax.grad(function, wrt)(*inputs)


def of_the_gradient(loss, wrt, mode, *inputs):
    """The derivative for input `wrt` of the product of `VECTOR` and the gradient for the logits, input 1."""
    vector = tensor(VECTOR, "float32")

    def product(*inputs):
        return keras.ops.sum(gradient(loss, *inputs, wrt=1) * vector)

    return to_numpy(MODES[mode](lambda *inputs: gradient(product, *inputs, wrt=wrt))(*inputs))


@pytest.mark.parametrize("mode", TWO_MODES if BACKEND == "jax" else (*TWO_MODES, "graph"))
def test_the_gradient_has_its_derivatives_for_weights_and_targets(mode):
    logits, targets, weights = (tensor(a, "float32") for a in (LOGITS, TARGETS, WEIGHTS))
    got = of_the_gradient(DENSE, 2, mode, targets, logits, weights)
    np.testing.assert_allclose(got, ((PROBABILITIES - TARGETS) * VECTOR).sum(1) / ROWS, atol=1e-6)
    got = of_the_gradient(SPARSE, 2, mode, tensor(LABELS, "int32"), logits, weights)
    np.testing.assert_allclose(got, ((PROBABILITIES - np.eye(CLASSES)[LABELS]) * VECTOR).sum(1) / ROWS, atol=1e-6)
    got = of_the_gradient(DENSE, 0, mode, targets, logits, weights)
    expected = WEIGHTS[:, None] / ROWS * ((PROBABILITIES * VECTOR).sum(1, keepdims=True) - VECTOR)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("mode", TWO_MODES if BACKEND == "jax" else (*TWO_MODES, "graph"))
def test_the_derivative_for_a_weight_is_its_loss(mode):
    logits, weights = tensor(LOGITS, "float32"), tensor(WEIGHTS, "float32")
    f = MODES[mode](lambda *inputs: gradient(SPARSE, *inputs, wrt=2))
    got = to_numpy(f(tensor(LABELS, "int32"), logits, weights))
    np.testing.assert_allclose(got, -np.log(PROBABILITIES[np.arange(ROWS), LABELS]) / ROWS, rtol=2e-6)


def test_a_label_under_weight_0_may_be_anything():
    labels = np.where(WEIGHTS == 0, 99, LABELS)
    logits, weights = tensor(LOGITS, "float32"), tensor(WEIGHTS, "float32")
    got = SPARSE(tensor(labels, "int32"), logits, weights)
    nll = -np.log(PROBABILITIES[np.arange(ROWS), LABELS])
    np.testing.assert_allclose(to_numpy(got), (WEIGHTS * nll).sum() / ROWS, rtol=2e-6)
    with pytest.raises(ValueError, match="99"):
        SPARSE(tensor(labels, "int32"), logits, tensor(np.ones(ROWS), "float32"))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "eager"])
def test_logits_that_a_traced_function_closes_over_are_as_its_arguments(mode):
    logits = tensor(LOGITS, "float32")
    for loss, labels in ((DENSE, tensor(TARGETS, "float32")), (SPARSE, tensor(LABELS, "int32"))):
        expected = to_numpy(loss(labels, logits))
        got = MODES[mode](lambda scale, loss=loss, labels=labels: scale * loss(labels, logits))(tensor(2.0, "float32"))
        np.testing.assert_allclose(to_numpy(got), 2 * expected, rtol=1e-6)
