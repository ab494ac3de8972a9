"""Derivatives of losses whose value and gradient are one program: for weights and targets, and of the gradient."""

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests.backend import BACKEND, MODES, TWO_MODES, tensor, to_numpy
from tests.tiers import fast_for

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


@fast_for("graph", "jit")
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


@fast_for("graph", "jit")
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


@fast_for("graph", "jit")
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "eager"])
def test_logits_that_a_traced_function_closes_over_are_as_its_arguments(mode):
    logits = tensor(LOGITS, "float32")
    for loss, labels in ((DENSE, tensor(TARGETS, "float32")), (SPARSE, tensor(LABELS, "int32"))):
        expected = to_numpy(loss(labels, logits))
        got = MODES[mode](lambda scale, loss=loss, labels=labels: scale * loss(labels, logits))(tensor(2.0, "float32"))
        np.testing.assert_allclose(to_numpy(got), 2 * expected, rtol=1e-6)


def test_variables_are_read_and_have_gradients():
    targets, logits, weights = (keras.Variable(a, dtype="float32") for a in (TARGETS, LOGITS, WEIGHTS))
    losses = -(TARGETS * np.log(PROBABILITIES)).sum(1)
    expected = (WEIGHTS * losses).sum() / ROWS
    np.testing.assert_allclose(to_numpy(DENSE(targets, logits, weights)), expected, rtol=2e-6)
    if BACKEND != "tensorflow":
        return
    import tensorflow as tf

    variables = [variable.value for variable in (targets, logits, weights)]
    with tf.GradientTape() as tape:
        value = DENSE(*variables)
    np.testing.assert_allclose(to_numpy(value), expected, rtol=2e-6)
    for_targets, for_logits, for_weights = map(to_numpy, tape.gradient(value, variables))
    scale = WEIGHTS[:, None] / ROWS
    np.testing.assert_allclose(for_targets, -scale * np.log(PROBABILITIES), rtol=1e-5)
    np.testing.assert_allclose(for_logits, scale * (PROBABILITIES - TARGETS), atol=1e-6)
    np.testing.assert_allclose(for_weights, losses / ROWS, rtol=2e-6)


def test_one_batch_under_several_weights_is_mapped():
    weights, nll = np.stack([WEIGHTS, 2 * WEIGHTS]), -np.log(PROBABILITIES[np.arange(ROWS), LABELS])
    labels, logits = tensor(LABELS, "int32"), tensor(LOGITS, "float32")
    if BACKEND == "tensorflow":
        import tensorflow as tf

        got = tf.vectorized_map(lambda one: SPARSE(labels, logits, one), tensor(weights, "float32"))
    else:
        import jax

        got = jax.vmap(lambda one: SPARSE(labels, logits, one))(tensor(weights, "float32"))
    np.testing.assert_allclose(to_numpy(got), weights @ nll / ROWS, rtol=2e-6)


def test_an_option_assigned_later_does_not_change_other_losses():
    # So many rows that there is no program of other tests for them.
    labels, logits = tensor(np.tile(LABELS, 200), "int32"), tensor(np.tile(LOGITS, (200, 1)), "float32")
    changed = kx.losses.SparseCategoricalCrossentropy(from_logits=True, z_loss=0.125)
    other = kx.losses.SparseCategoricalCrossentropy(from_logits=True, z_loss=0.125)
    changed(labels[:ROWS], logits[:ROWS])
    changed.z_loss = 64.0
    nll = -np.log(PROBABILITIES[np.arange(ROWS), LABELS])
    expected = (nll + 0.125 * np.log(np.exp(LOGITS).sum(1)) ** 2).mean()
    np.testing.assert_allclose(to_numpy(other(labels, logits)), expected, rtol=2e-6)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="forward mode of JAX takes no function with a gradient of its own")
@pytest.mark.parametrize("mode", ["eager", pytest.param("graph", marks=pytest.mark.whole)])
def test_forward_mode_sees_logits_and_weights(mode):
    import tensorflow as tf

    labels, logits, weights, vector = (
        tensor(a, d) for a, d in ((LABELS, "int32"), (LOGITS, "float32"), (WEIGHTS, "float32"), (VECTOR, "float32"))
    )

    def tangent(function, primal, tangent):
        with tf.autodiff.ForwardAccumulator(primal, tangent) as accumulator:
            value = function()
        return accumulator.jvp(value)

    def tangents():
        return (
            tangent(lambda: SPARSE(labels, logits, weights), weights, tf.ones_like(weights)),
            tangent(lambda: SPARSE(labels, logits, weights), logits, vector),
            tangent(lambda: gradient(SPARSE, labels, logits, weights, wrt=1), logits, vector),
        )

    for_weights, for_logits, of_gradient = map(to_numpy, MODES[mode](tangents)())
    p, scale = PROBABILITIES, WEIGHTS[:, None] / ROWS
    np.testing.assert_allclose(for_weights, -np.log(p[np.arange(ROWS), LABELS]).sum() / ROWS, rtol=2e-6)
    np.testing.assert_allclose(for_logits, (scale * (p - np.eye(CLASSES)[LABELS]) * VECTOR).sum(), rtol=1e-5)
    expected = scale * p * (VECTOR - (p * VECTOR).sum(1, keepdims=True))
    np.testing.assert_allclose(of_gradient, expected, atol=1e-6)
