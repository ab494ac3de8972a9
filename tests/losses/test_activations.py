"""A loss finds the logits before a softmax or sigmoid, or learns from bare probabilities, where Keras' does not."""

import functools
import math
import warnings

import keras
import numpy as np
import pytest
from keras import ops

from tests.backend import every_mode, tensor, tensorflow_only, to_numpy, value_and_gradient
from tests.losses.cases import LOW_PRECISION, Binary, Categorical, Sequence, Sparse
from tests.losses.running import assert_close, run
from tests.tiers import fast_for, sample

# Logits behind an activation


def _head(activation, policy, logits):
    """A model whose input 1 gives these logits, through an activation."""
    return keras.Sequential(
        [
            keras.Input((1,)),
            keras.layers.Dense(
                len(logits),
                activation,
                use_bias=False,
                kernel_initializer=lambda shape, dtype: ops.cast(ops.reshape(logits, shape), dtype),
                dtype=policy,
                name="probabilities",
            ),
        ]
    )


POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
FITS = ({"jit_compile": False}, {"jit_compile": True}, {"run_eagerly": True})
HEADS = [
    *[(Sparse, policy, fit) for policy in POLICIES for fit in FITS],
    *[(Categorical, policy, FITS[0]) for policy in POLICIES],
    (functools.partial(Sparse, ignore_class=-1), "mixed_float16", FITS[0]),
    (Sequence, "mixed_float16", FITS[0]),
]


@fast_for("Categorical*")
@pytest.mark.parametrize(
    "loss, policy, fit", sample(HEADS, [(Sparse, "mixed_float16", FITS[0]), (Categorical, "mixed_bfloat16", FITS[0])])
)
def test_a_softmax_that_is_wrong_with_certainty_learns(loss, policy, fit):
    """Logits [0, 30], label 0: loss 30, gradient [-1, 1], also through the casts of mixed precision."""
    model = _head("softmax", policy, [0.0, 30.0])
    model.compile(keras.optimizers.SGD(1.0), loss(from_logits=False), **fit)
    labels = np.array([[1, 0]]) if loss is Categorical else np.array([0])
    history = model.fit(np.ones((1, 1)), labels, verbose=0).history["loss"]
    assert history == [30.0]
    assert np.array_equal(model.get_weights()[0], [[1.0, 29.0]])


@pytest.mark.parametrize(
    "policy, fit", sample([(policy, fit) for policy in POLICIES for fit in FITS], [("mixed_float16", FITS[0])])
)
def test_a_sigmoid_that_is_wrong_with_certainty_learns(policy, fit):
    """Logits [-40, 40], labels [1, 0]: loss 40, gradient [-1, 1] / 2."""
    model = _head("sigmoid", policy, [-40.0, 40.0])
    model.compile(keras.optimizers.SGD(1.0), Binary(), **fit)
    history = model.fit(np.ones((1, 1)), np.array([[1, 0]]), verbose=0).history["loss"]
    assert history == [40.0]
    assert np.array_equal(model.get_weights()[0], [[-39.5, 39.5]])


@fast_for("-1")
@tensorflow_only(reason="Keras leaves nothing on JAX arrays")
@pytest.mark.parametrize("ignore_class", [None, -1])
def test_ignore_class_does_not_lose_the_logits_behind_a_softmax(ignore_class):
    import tensorflow as tf

    logits = tf.constant([[0.0, 100.0]])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = Sparse(ignore_class=ignore_class)(np.array([0]), keras.activations.softmax(logits))
    assert float(loss) == 100.0
    assert np.array_equal(tape.gradient(loss, logits), [[-1.0, 1.0]])


@every_mode
def test_a_traced_activation_has_the_gradient_of_its_logits_unless_it_is_frozen(mode):
    x = tensor(np.array([[0.0, 100.0]], "float32"))

    def of(freeze, loss=Sparse, activation="softmax", labels=(0,)):
        activate = getattr(keras.activations, activation)
        return lambda x: loss()(np.array(labels), freeze(activate(x)))

    loss, gradient = value_and_gradient(of(lambda p: p), x, mode=mode)
    assert loss == 100.0
    assert np.array_equal(gradient, [[-1.0, 1.0]])
    loss, gradient = value_and_gradient(of(lambda p: p, Binary, "sigmoid", [[0, 0]]), x, mode=mode)
    assert_close(loss, (100 + math.log(2)) / 2)
    assert_close(gradient, [[0.25, 0.5]])
    loss, gradient = value_and_gradient(lambda x: of(ops.stop_gradient)(x) + 0.0 * ops.sum(x), x, mode=mode)
    assert_close(loss, -math.log(1e-7), rtol=1e-6)
    assert np.array_equal(gradient, [[0.0, 0.0]])


@every_mode
@pytest.mark.parametrize("axis", [1, -1])
def test_a_traced_softmax_over_another_axis_counts_as_probabilities(axis, mode):
    x = tensor(np.random.default_rng(0).normal(scale=20, size=(2, 3, 4)).astype("float32"))
    labels = np.ones((2, 4) if axis == 1 else (2, 3), int)
    loss = Sparse(axis=axis)
    found, _ = value_and_gradient(lambda x: loss(labels, keras.activations.softmax(x, axis=1)), x, mode=mode)
    p = tensor(to_numpy(keras.activations.softmax(x, axis=1)).astype("float32"))
    expected = Sparse(axis=1, from_logits=True)(labels, x) if axis == 1 else loss(labels, p)
    assert_close(found, float(expected), rtol=1e-6)


def _warning(loss, layer, activation, use):
    return (
        f"{loss.__name__} has from_logits=True, but {layer} ends in a {activation}. The loss {use}. Remove the "
        "activation, or set from_logits=False."
    )


EXPECTED_WARNINGS = [
    (Sparse, "softmax", "uses the logits before it", "float32"),
    (Sparse, "softmax", "uses the logits before it", "mixed_bfloat16"),
    (Categorical, "softmax", "uses the logits before it", "float32"),
    (Binary, "sigmoid", "uses the logits before it", "mixed_bfloat16"),
    (Sequence, "sigmoid", "takes its output as logits", "float32"),
    (Binary, "softmax", "takes its output as logits", "float32"),
]


@fast_for("Sparse*")
@pytest.mark.parametrize(
    "loss, activation, use, policy", sample(EXPECTED_WARNINGS, [EXPECTED_WARNINGS[i] for i in (1, 4)])
)
def test_from_logits_on_the_output_of_an_activation_warns_once_and_names_the_layer(loss, activation, use, policy):
    model = _head(activation, policy, [0.0, 1.0])
    model.compile("sgd", loss(from_logits=True))
    x, y = np.ones((2, 1)), np.array([0, 1]) if issubclass(loss, Sparse) else np.eye(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model.fit(x, y, verbose=0)
            model.evaluate(x, y, verbose=0)
    sentences = [str(w.message) for w in caught if "from_logits" in str(w.message)]
    assert sentences == [_warning(loss, "layer 'probabilities'", activation, use)]


@tensorflow_only(reason="Keras leaves nothing on JAX arrays")
@pytest.mark.parametrize(
    "activation, use", [("softmax", "uses the logits before it"), ("sigmoid", "takes its output as logits")]
)
def test_from_logits_on_an_eager_activation_warns_once(activation, use):
    outputs = getattr(keras.activations, activation)(tensor(np.array([[0.0, 3.0]], "float32")))
    loss = Sparse(from_logits=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [float(loss(np.array([0]), outputs)) for _ in range(2)]
    assert [str(w.message) for w in caught] == [_warning(Sparse, "the last layer", activation, use)]
    logits = 3.0 if activation == "softmax" else 1 / (1 + math.exp(-3)) - 0.5
    assert_close(results, [math.log1p(math.exp(logits))] * 2)


@fast_for("Sparse*")
@tensorflow_only(reason="Keras leaves nothing on JAX arrays")
@pytest.mark.parametrize("loss, activation", [(Sparse, "softmax"), (Categorical, "softmax"), (Binary, "sigmoid")])
def test_the_warning_points_at_the_call(loss, activation):
    outputs = getattr(keras.activations, activation)(tensor(np.array([[0.0, 3.0]], "float32")))
    with pytest.warns(UserWarning, match="from_logits") as caught:
        loss(from_logits=True)(np.array([0]) if loss is Sparse else np.array([[1, 0]]), outputs)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "loss, activation",
    sample([(Sparse, "softmax"), (Categorical, "softmax"), (Binary, "sigmoid")], [(Sparse, "softmax")]),
)
def test_from_logits_on_the_output_of_its_own_activation_uses_the_logits(loss, activation):
    """The same loss and the same training as without the activation."""
    histories = []
    for head, from_logits in [(activation, True), (activation, False), (None, True)]:
        model = _head(head, "float32", [0.5, 3.0])
        model.compile(keras.optimizers.SGD(1.0), loss(from_logits=from_logits))
        y = np.array([0]) if loss is Sparse else np.array([[1, 0]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            histories.append((model.fit(np.ones((1, 1)), y, verbose=0).history["loss"], model.get_weights()[0]))
    for history, weights in histories:
        assert_close(history, histories[2][0])
        assert_close(weights, histories[2][1])


# Bare probabilities

EPSILON = np.float32(1e-7)
ALMOST_1 = np.float64(np.float32(1) - EPSILON)


@every_mode
@pytest.mark.parametrize("loss_dtype", sample(["float32", *LOW_PRECISION], ["float32"]))
def test_binary_probabilities_of_0_and_1_have_the_loss_of_keras_and_a_gradient(loss_dtype, mode):
    p, y = np.array([[0.0], [1], [0], [1]], "float32"), np.array([[0], [1], [1], [0]])
    loss, gradient = run(Binary(reduction=None, dtype=loss_dtype), y, p, mode=mode)
    rounded = -math.log1p(-1e-7), -math.log(ALMOST_1), -math.log(1e-7), -math.log(1 - ALMOST_1)
    assert_close(loss, to_numpy(tensor(np.array(rounded, "float32"), loss_dtype)))
    # 1 / (1 - p) and -1 / p of the clipped probabilities.
    assert_close(gradient[:, 0], [1, -1, -1e7, 1 / (1 - ALMOST_1)], rtol=3e-6)


@every_mode
@pytest.mark.parametrize("dtype", sample(list(LOW_PRECISION), ["bfloat16"]))
@pytest.mark.parametrize("loss", [Binary, Categorical, Sparse])
def test_low_precision_probabilities_of_0_and_1_have_finite_losses_and_gradients(loss, dtype, mode):
    """1 - 1e-7 is 1 in them, which must not make NaN of a model that is right."""
    p = tensor(np.array([[0.0, 1.0], [1.0, 0.0]], "float32"), dtype)
    y = np.array([1, 1]) if loss is Sparse else np.array([[0, 1], [0, 1]])
    result, gradient = run(loss(reduction=None, dtype=dtype), y, p, mode=mode)
    assert np.isfinite(result).all()
    assert result[0] < 1e-6
    assert 15.9 < result[1] < 16.2
    assert np.isfinite(gradient).all()
    assert gradient[1, 1] < -1


@every_mode
@pytest.mark.parametrize("loss", [Categorical, Sparse])
def test_a_probability_of_0_for_the_label_has_the_loss_of_keras_and_a_gradient(loss, mode):
    p = np.array([[0.0, 1.0, 0.0]], "float32")
    y = np.array([0]) if loss is Sparse else np.array([[1, 0, 0]])
    result, gradient = run(loss(), y, p, mode=mode)
    assert_close(result, -math.log(1e-7 / (1 + 2e-7)))
    # d/dp_k of log(sum p) - log p_y, where the sum is 1 + 2e-7.
    assert_close(gradient, [[1 / (1 + 2e-7) - 1e7, 1 / (1 + 2e-7), 1 / (1 + 2e-7)]])


@every_mode
@pytest.mark.parametrize("loss", [Categorical, Sparse])
def test_probabilities_that_are_all_0_have_the_loss_of_uniform_ones(loss, mode):
    y = np.array([0]) if loss is Sparse else np.array([[1, 0, 0]])
    result, gradient = run(loss(), y, np.zeros((1, 3), "float32"), mode=mode)
    assert_close(result, math.log(3))
    assert_close(gradient, [[-2e7 / 3, 1e7 / 3, 1e7 / 3]])


@fast_for("Sparse*")
@pytest.mark.parametrize("loss", [Binary, Categorical, Sparse])
def test_probabilities_between_0_and_1_have_the_loss_and_gradient_of_keras(loss):
    rng = np.random.default_rng(12)
    p = rng.dirichlet(np.ones(5), size=20).astype("float32").clip(1e-5, 1 - 1e-5)
    y = rng.integers(0, 5, 20) if loss is Sparse else np.eye(5)[rng.integers(0, 5, 20)]
    theirs, their_gradient = run(getattr(keras.losses, loss.__name__)(), y, p)
    ours, our_gradient = run(loss(), y, p)
    assert_close(ours, theirs, rtol=3e-6)
    assert_close(our_gradient, their_gradient, scale=3e-6)
