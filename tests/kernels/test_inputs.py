"""What kernels take for labels, logits, weights and heads, and what they refuse."""

import keras
import numpy as np
import pytest

from keras_xent.kernels import (
    linear_cross_entropy,
    linear_softmax_cross_entropy,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
    sparse_softmax_cross_entropy,
)
from tests import oracles
from tests.backend import BACKEND, to_numpy
from tests.kernels.softmax_examples import dense, example, one_hot, sparse


def test_one_number_may_have_a_mask():
    assert to_numpy(sigmoid_cross_entropy(1.0, 2.0, mask=False)) == 0.0
    np.testing.assert_allclose(to_numpy(sigmoid_cross_entropy(1.0, 2.0, mask=True)), np.log1p(np.exp(-2)), rtol=2e-6)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="JAX has no variables of its own")
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_logits_that_are_variables_have_gradients_in_a_graph(kernel, jit_compile):
    import tensorflow as tf

    labels, logits, _ = example()
    f = sparse(labels) if kernel == "sparse" else dense(one_hot(labels))
    variable = tf.Variable(logits, dtype="float32")

    @tf.function(autograph=False, jit_compile=jit_compile)
    def gradient():
        with tf.GradientTape() as tape:
            loss = f(variable)
        return tape.gradient(loss, variable)

    expected = oracles.sparse(labels, logits)[1]
    np.testing.assert_allclose(gradient(), expected, rtol=2e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.skipif(BACKEND != "tensorflow", reason="JAX knows all sizes")
def test_weights_of_classes_have_their_number_where_it_is_known_late():
    import tensorflow as tf

    def of_any_size(function):
        return tf.function(function, autograph=False, input_signature=[tf.TensorSpec([None, None])])

    labels, logits, weights = [0, 2], np.ones((2, 3), "float32"), [1.0, 2.0, 0.5]
    three = of_any_size(lambda x: sparse_softmax_cross_entropy(labels, x, class_weight=weights))
    np.testing.assert_allclose(three(logits), np.log(3) * np.array([1.0, 0.5]), rtol=2e-6)
    kernels = {
        "class_weight": [
            lambda x: sparse_softmax_cross_entropy(labels, x, class_weight=[2.0]),
            lambda x: softmax_cross_entropy(x, x, class_weight=[2.0]),
        ],
        "pos_weight": [lambda x: sigmoid_cross_entropy(x, x, pos_weight=[2.0])],
    }
    for argument, functions in kernels.items():
        for function in functions:
            with pytest.raises(tf.errors.InvalidArgumentError, match=f"{argument}_must"):
                of_any_size(function)(logits)
    with pytest.raises(ValueError, match="is not known before the step runs. Received: a dict"):
        of_any_size(lambda x: sparse_softmax_cross_entropy(labels, x, class_weight={1: 2.0}))(logits)


@pytest.mark.parametrize("kernel", [sparse_softmax_cross_entropy, softmax_cross_entropy, sigmoid_cross_entropy])
def test_inputs_that_are_not_dense_tensors_of_numbers_are_refused(kernel):
    x = np.ones((4, 3), "float32")
    for one in (keras.KerasTensor((4, 3)), None, [[1.0], [1.0, 2.0]]):
        with pytest.raises(ValueError, match="`logits` must be a dense tensor of numbers"):
            kernel(x, one)
        with pytest.raises(ValueError, match="`(labels|targets)` must be a dense tensor of numbers"):
            kernel(one, x)


@pytest.mark.parametrize("name", ["hidden", "kernel", "labels", "targets"])
def test_inputs_of_heads_that_are_missing_are_named(name):
    given = {"hidden": np.ones((4, 3)), "kernel": np.ones((3, 5)), "labels": np.zeros(4, "int32"), name: None}
    with pytest.raises(ValueError, match=rf"`{name}` must be a dense tensor of numbers. Received: None"):
        if name == "targets":
            linear_softmax_cross_entropy(given["hidden"], given["kernel"], None)
        else:
            linear_cross_entropy(given["hidden"], given["kernel"], given["labels"])


@pytest.mark.parametrize("name", ["bias", "mask", "token_weights"])
@pytest.mark.parametrize("kernel", [linear_cross_entropy, linear_softmax_cross_entropy])
def test_optional_inputs_that_are_not_numbers_are_named(kernel, name):
    labels = np.zeros(4, "int32") if kernel is linear_cross_entropy else np.ones((4, 5))
    for one in ("hidden", {"a": 1.0}):
        with pytest.raises(ValueError, match=rf"`{name}` must be a dense tensor of numbers"):
            kernel(np.ones((4, 3)), np.ones((3, 5)), labels, **{name: one})


def test_a_single_label_that_is_too_large_for_jax_is_refused():
    with pytest.raises(ValueError, match="`labels` must be classes from 0 to 2"):
        sparse_softmax_cross_entropy(np.int64(2**32), np.ones(3, "float32"))
