"""Weights of classes that are variables, which a training run may change."""

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests.backend import tensor, value_and_gradient

VARIABLES = {
    "sparse": (
        lambda w: kx.losses.SparseCategoricalCrossentropy(from_logits=True, class_weight=w, label_smoothing=0.1),
        np.array([0, 2, 1]),
    ),
    "sequence": (lambda w: kx.losses.MaskedSequenceCrossentropy(class_weight=w), np.array([0, 2, 1])),
    "categorical": (
        lambda w: kx.losses.CategoricalCrossentropy(from_logits=True, class_weight=w, reduction="token_mean"),
        np.eye(3, dtype="float32")[[0, 2, 1]],
    ),
    "binary": (
        lambda w: kx.losses.BinaryCrossentropy(from_logits=True, pos_weight=w),
        np.eye(3, dtype="float32")[[0, 2, 1]],
    ),
}
FIRST, SECOND = [1.0, 2.0, 3.0], [0.5, 0.0, 4.0]


@pytest.mark.parametrize("name", VARIABLES)
def test_weights_that_are_a_variable_are_read_in_each_call(name):
    make, y = VARIABLES[name]
    x = np.random.default_rng(0).normal(size=(3, 3)).astype("float32")
    weights = keras.Variable(FIRST)
    loss = make(weights)
    for values in (FIRST, SECOND):
        weights.assign(values)
        got, expected = (value_and_gradient(lambda x: f(y, x), tensor(x)) for f in (loss, make(values)))  # noqa: B023
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
    key = "pos_weight" if name == "binary" else "class_weight"
    assert loss.get_config()[key] == SECOND and f"{key}=a variable (3,)" in repr(loss)
    copied = type(loss).from_config(loss.get_config())
    np.testing.assert_allclose(float(copied(y, x)), float(loss(y, x)), rtol=1e-6)
    for wrong in (keras.Variable([[1.0]]), keras.Variable([-1.0, 1.0, 1.0])):
        with pytest.raises(ValueError, match=f"`{key}` must"):
            make(wrong)


class Weighted(keras.layers.Layer):
    """A layer with the weights of the classes."""

    def build(self, shape):
        self.classes = self.add_weight(shape=(3,), initializer="ones", trainable=False)

    def call(self, x):
        return 1.0 * x


@pytest.mark.parametrize("fused", [False, True], ids=["dense", "fused"])
def test_a_step_follows_a_variable_or_says_that_it_would_not(fused):
    x, y = np.random.default_rng(0).normal(size=(4, 3)).astype("float32"), np.array([0, 2, 1, 1])
    log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
    head = (kx.layers.LogitsDense if fused else keras.layers.Dense)(3, kernel_initializer="identity")
    layer = Weighted()
    model = keras.Sequential([keras.Input((3,)), layer, head])
    for weights in (layer.classes, keras.Variable(FIRST)):
        model.compile(
            keras.optimizers.SGD(0.0),
            kx.losses.SparseCategoricalCrossentropy(from_logits=True, class_weight=weights),
        )
        if weights is not layer.classes and keras.backend.backend() == "jax":
            with pytest.raises(ValueError, match="`class_weight` is a variable that this compiled step does not have"):
                model.train_on_batch(x, y)
            continue
        for values in (FIRST, SECOND):
            weights.assign(values)
            right = -(log_p[np.arange(4), y] * np.array(values)[y]).mean()
            np.testing.assert_allclose(model.train_on_batch(x, y), right, rtol=1e-6)
