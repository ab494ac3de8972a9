"""Predictions that are probabilities: which logits are behind them, and what if there are none."""

import functools
import itertools
import math
import warnings

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests.backend import BACKEND, DTYPES, MODES, every_mode, tensor, tensorflow_only, to_numpy
from tests.losses.cases import NAMES, make
from tests.losses.running import assert_close, run
from tests.tiers import fast_for, sample

Binary, Categorical, Sparse = (
    kx.losses.BinaryCrossentropy,
    kx.losses.CategoricalCrossentropy,
    kx.losses.SparseCategoricalCrossentropy,
)
NAN = math.nan


# The logits behind


@tensorflow_only(reason="only TensorFlow graphs know the operations that made a tensor")
@pytest.mark.parametrize("through", ["stop_gradient", "stop_gradient and cast"])
def test_a_frozen_softmax_is_not_trained_through_its_logits(through):
    import tensorflow as tf

    @tf.function(autograph=False)
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            frozen = tf.stop_gradient(tf.nn.softmax(x))
            if through != "stop_gradient":
                frozen = tf.identity(tf.cast(frozen, "float64"))
            loss = Sparse()(np.array([0]), frozen)
        return tape.gradient(loss, x, unconnected_gradients="zero")

    assert np.array_equal(gradient(tf.constant([[1.0, 2.0, 3.0]])), [[0, 0, 0]])


@tensorflow_only(reason="Keras leaves nothing on JAX arrays")
@pytest.mark.parametrize("logits", [[[-10.0, 10.0]], [[-40.0, 40.0]], [[0.02, -0.01]], [[0.0, 20.0], [NAN, 1.0]]])
def test_an_eager_softmax_is_distinguished_from_a_sigmoid(logits):
    logits = tensor(logits, "float32")
    expected = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)
    outputs = keras.activations.softmax(logits)
    labels = np.zeros(len(logits), int)
    assert_close(to_numpy(Sparse(reduction=None)(labels, outputs)), to_numpy(expected(labels, logits)))
    # To a binary loss these are bare probabilities.
    bare = Binary(reduction=None)(np.zeros(logits.shape), tensor(to_numpy(outputs), "float32"))
    assert_close(to_numpy(Binary(reduction=None)(np.zeros(logits.shape), outputs)), to_numpy(bare))


@tensorflow_only(reason="Keras leaves nothing on JAX arrays")
def test_an_eager_sigmoid_is_distinguished_from_a_softmax():
    logits = tensor([[30.0], [NAN], [-1.0]], "float32")
    losses = Binary(reduction=None)(np.zeros((3, 1)), keras.activations.sigmoid(logits))
    assert_close(to_numpy(losses), [30.0, NAN, math.log1p(math.exp(-1))])
    # Where both give the same, it was the one that the loss wants.
    logits = tensor([[40.0]], "float32")
    assert_close(float(Binary()(np.zeros((1, 1)), keras.activations.sigmoid(logits))), 40.0)
    logits = tensor([[0.0, 100.0]], "float32")
    assert_close(float(Sparse()(np.zeros(1, int), keras.activations.softmax(logits))), 100.0)


@tensorflow_only(reason="Keras leaves nothing on JAX arrays")
def test_an_eager_softmax_over_another_axis_is_recognized():
    logits = np.random.default_rng(0).normal(scale=0.1, size=(2, 3, 10)).astype("float32")
    labels = np.ones((2, 10), int)
    outputs = keras.activations.softmax(tensor(logits), axis=1)
    expected = Sparse(from_logits=True, axis=1)(labels, logits)
    assert float(Sparse(axis=1)(labels, outputs)) == float(expected)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_may_come_from_an_activation(name, activation):
    outputs = getattr(keras.activations, activation)(tensor(np.zeros((0, 2, 3), "float32")))
    labels = np.zeros((0, 2) if "Sparse" in name or "Masked" in name else (0, 2, 3), int)
    assert float(make(name, from_logits=False)(labels, outputs)) == 0


@fast_for("Binary*-tf-*", "Masked*-keras-*")
@every_mode
@pytest.mark.parametrize("kind", ["keras", "tf"])
@pytest.mark.parametrize("name", NAMES)
def test_predictions_may_be_a_variable(name, kind, mode):
    logits = np.array([[[1.0, 2.0], [0.5, 0.25]]], "float32")
    if kind == "keras":
        variable = keras.Variable(logits)
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        variable = tf.Variable(logits)
    else:
        pytest.skip("no tf.Variable")
    labels = np.array([[1, 0]]) if "Sparse" in name or "Masked" in name else np.array([[[0, 1], [1, 0]]])
    for from_logits in (True, False):
        loss = make(name, from_logits=from_logits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = float(loss(labels, logits))
            assert_close(float(MODES[mode](functools.partial(loss, y_pred=variable))(tensor(labels))), expected)
    metric = kx.metrics.Perplexity()
    metric.update_state(np.array([[1, 0]]), variable)
    assert_close(float(metric.result()), math.exp(float(Sparse(from_logits=True)(np.array([[1, 0]]), logits))))


# Bare probabilities

UNDER = [
    (Sparse(ignore_class=-1), np.array([1, -1]), None),
    (Sparse(), np.array([1, 0]), np.array([1.0, 0.0])),
    (Categorical(), np.array([[0, 1], [1, 0]]), np.array([1.0, 0.0])),
    (Binary(ignore_class=-1), np.array([[0, 1], [-1, -1]]), None),
    (Binary(), np.array([[0, 1], [0, 1]]), np.array([1.0, 0.0])),
]


@fast_for("loss3-*")
@every_mode
@pytest.mark.parametrize("loss, labels, weights", UNDER)
def test_masked_nan_probabilities_leave_no_trace(loss, labels, weights, mode):
    clean = np.array([[0.2, 0.8], [0.5, 0.5]], "float32")
    poisoned = np.array([[0.2, 0.8], [NAN, NAN]], "float32")
    result, gradient = run(loss, labels, poisoned, weights, mode=mode)
    expected, expected_gradient = run(loss, labels, clean, weights, mode=mode)
    assert np.array_equal(result, expected)
    assert np.array_equal(gradient, expected_gradient)
    assert np.array_equal(gradient[1], [0, 0])


@fast_for("loss1-*")
@every_mode
@pytest.mark.parametrize("loss, labels", [(Sparse(), np.array([0])), (Binary(), np.array([[1, 0, 1, 0]]))])
def test_values_outside_0_and_1_have_no_gradient(loss, labels, mode):
    """Without a gradient of 1e7 a forgotten `from_logits=True` does not destroy the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outside = np.array([[-3.0, -1e-3, 0.0, 1.0]], "float32")
        _, gradient = run(loss, labels, outside, mode=mode)
        assert np.array_equal(gradient[0] == 0, [True, True, False, False])
        _, gradient = run(Binary(), np.array([[0, 1, 0]]), np.array([[1.01, 7.0, 1.0005]], "float32"), mode=mode)
        assert np.array_equal(gradient[0] == 0, [True, True, False])


def test_unnormalized_probabilities_have_the_gradient_of_keras():
    """Keras divides by the sum. Numbers above 1 are no probabilities of one label, but may be a share of a sum."""
    scores, targets = np.array([[2.0, 1.0, 5.0]], "float32"), np.array([[0.0, 0.5, 0.5]], "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result, gradient = run(Categorical(), targets, scores)
    expected, expected_gradient = run(keras.losses.CategoricalCrossentropy(), targets, scores)
    assert_close(result, expected)
    assert_close(gradient, expected_gradient, scale=1e-6)


@pytest.mark.skipif("float64" not in DTYPES, reason="JAX has no float64 unless asked")
def test_a_float64_loss_takes_the_logarithm_of_probabilities_in_float64():
    p = np.array([[0.3, 0.7]], "float32")
    loss = float(Sparse(dtype="float64")(np.array([0]), p))
    np.testing.assert_allclose(loss, -np.log(p[0, 0] / p.astype("float64").sum()), rtol=1e-14)
    p = np.array([[0.3]], "float32")
    loss = float(Binary(dtype="float64")(np.array([[1]]), p))
    np.testing.assert_allclose(loss, -np.log(p[0, 0].astype("float64")), rtol=1e-14)


# Logits taken for probabilities


def _caught(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            action()
    return [str(w.message) for w in caught if "from_logits" in str(w.message)]


def _sentence(loss, layer, why):
    return (
        f"{loss.__name__} has from_logits=False, but the output of {layer} {why}. The loss takes it for probabilities. "
        "If these are logits, set from_logits=True."
    )


@pytest.mark.parametrize("outputs, why", [([[-2.0, 0.5]], "from -2 to 0.5"), ([[0.5, 30.25]], "from 0.5 to 30.2")])
def test_values_outside_0_and_1_warn_once(outputs, why):
    loss = Sparse()
    sentences = _caught(lambda: loss(np.array([0]), tensor(outputs, "float32")))
    assert sentences == [_sentence(Sparse, "the last layer", f"holds values {why}")]


@pytest.mark.parametrize("outputs", [[[0.0, 1.0]], [[-1e-4, 1.0001]], [[NAN, 0.5]], np.zeros((0, 2))])
def test_values_that_are_probabilities_do_not_warn(outputs):
    loss = Sparse()
    assert _caught(lambda: loss(np.zeros(len(outputs), int), tensor(outputs, "float32"))) == []


@fast_for("shape0-*")
@tensorflow_only(reason="only TensorFlow graphs know the operations that made a tensor")
@pytest.mark.parametrize(
    "shape, bias, policy",
    sample(
        list(itertools.product([(3,), (2, 3)], [True, False], ["float32", "mixed_bfloat16"])),
        [((3,), True, "float32"), ((2, 3), False, "mixed_bfloat16")],
    ),
)
def test_a_dense_layer_without_activation_warns_once_and_is_named(shape, bias, policy):
    dense = keras.layers.Dense(4, use_bias=bias, name="answers", dtype=policy)
    model = keras.Sequential([keras.Input(shape), dense])
    model.compile("sgd", Sparse())
    x, y = np.ones((2, *shape)), np.ones((2, *shape[:-1]), int)
    sentences = _caught(lambda: model.fit(x, y, verbose=0))
    assert sentences == [_sentence(Sparse, "layer 'answers'", "is a matrix product")]


@fast_for("two softmaxes")
@tensorflow_only(reason="only TensorFlow graphs know the operations that made a tensor")
@pytest.mark.parametrize("head", ["softmax", "two softmaxes", "scaled"])
def test_outputs_that_may_be_probabilities_do_not_warn(head):
    inputs = keras.Input((3,))
    softmax = lambda: keras.layers.Dense(2, activation="softmax")(inputs)  # noqa: E731
    outputs = {
        "softmax": softmax,
        "two softmaxes": lambda: 0.5 * softmax() + 0.5 * softmax(),
        "scaled": lambda: keras.layers.Rescaling(0.5)(softmax()),
    }[head]()
    model = keras.Model(inputs, outputs)
    model.compile("sgd", Sparse())
    assert _caught(lambda: model.fit(np.ones((2, 3)), np.ones(2, int), verbose=0)) == []
