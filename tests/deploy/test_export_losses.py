"""Exports of models with losses of every kind: functions, a user's own, options that mean something else here."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import keras_xent as kx
from keras_xent.deploy import export_scorer, load_scorer
from tests.tiers import sample

CLASSES = 7


def mixture(loss):
    """A language model that ends in the mean of two softmaxes, of which no logits are known."""
    keras.utils.set_random_seed(0)
    tokens = keras.Input((None,), dtype="int32")
    hidden = keras.layers.Embedding(CLASSES, 4, embeddings_initializer="normal")(tokens)
    parts = [keras.layers.Dense(CLASSES, "softmax")(hidden) for _ in range(2)]
    model = keras.Model(tokens, keras.layers.Average()(parts))
    model.compile(loss=loss)
    return model


FUNCTIONS = {
    "a name": "sparse_categorical_crossentropy",
    "Keras'": keras.losses.sparse_categorical_crossentropy,
    "ours": kx.losses.sparse_categorical_crossentropy,
    "partial": functools.partial(keras.losses.sparse_categorical_crossentropy, from_logits=False),
}


@pytest.mark.parametrize("name", sample(FUNCTIONS, ["a name"]))
def test_the_probabilities_of_a_function_are_no_logits(name, tmp_path):
    model, tokens = mixture(FUNCTIONS[name]), np.array([[1, 2, 3, 4], [5, 6, 0, 1]])
    export_scorer(model, tmp_path)
    p = model.predict(tokens[:, :-1], verbose=0).astype("float64")
    expected = np.log(np.take_along_axis(p, tokens[:, 1:, None], axis=-1))[..., 0]
    np.testing.assert_allclose(load_scorer(tmp_path).score(tokens)["token_log_likelihood"], expected, rtol=1e-5)
    assert list(tf.saved_model.load(str(tmp_path)).signatures["serve"].structured_outputs) == ["probabilities"]


class Own(keras.losses.Loss):
    """A loss without a configuration, whose constructor takes what it likes."""

    def __init__(self, power):
        super().__init__()
        self.power = power

    def call(self, y_true, y_pred):
        return ops.mean(ops.abs(y_true - y_pred) ** self.power, axis=-1)


MISSING = np.array([[1, 0, np.nan], [0, np.nan, np.nan]], "float32")
LOSSES = {
    "missing labels": (kx.losses.BinaryCrossentropy(from_logits=True, ignore_class=float("nan")), MISSING),
    "our function": (kx.losses.sparse_categorical_crossentropy, np.array([0, 2])),
    "a user's": (Own(3), np.zeros((2, 3), "float32")),
}


@pytest.mark.parametrize("name", LOSSES)
def test_each_example_has_its_loss(name, tmp_path):
    loss, labels = LOSSES[name]
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, "softmax" if name == "our function" else None)])
    model.compile(loss=loss)
    x = np.random.default_rng(0).standard_normal((2, 5)).astype("float32")
    export_scorer(model, tmp_path)
    scored = load_scorer(tmp_path).score(x, labels)
    np.testing.assert_allclose(scored["loss"], model.evaluate(x, labels, verbose=0), rtol=1e-6)
    assert scored["per_example_loss"].shape == (2,)
    np.testing.assert_allclose(scored["per_example_loss"].mean(), scored["loss"], rtol=1e-6)


def test_a_normalizer_divides_no_single_loss(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((4,), dtype="int32"), keras.layers.Embedding(9, 4), kx.layers.LogitsDense(CLASSES)]
    )
    model.compile(loss=kx.losses.MaskedSequenceCrossentropy(normalizer=5.0))
    tokens = np.array([[1, 2, 3, 4], [5, 6, 0, 1]])
    export_scorer(model, tmp_path, causal=False)
    scored = load_scorer(tmp_path).score(tokens, tokens)
    np.testing.assert_allclose(scored["per_example_loss"].sum() / 5.0, scored["loss"], rtol=1e-6)
