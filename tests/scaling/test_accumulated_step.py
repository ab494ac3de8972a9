"""All that a training step of Keras does, in micro-batches: two outputs, penalties, and what optimizers do."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from tests.scaling.test_accumulation import BATCH, LAST, SGD, distance, features
from tests.scaling.training import ALL_OPTIONS, CLASSES, TOKENS, data
from tests.tiers import whole


class Penalized(keras.layers.Layer):
    """A layer with a loss of its own: the mean over rows of the squares of what passes."""

    def call(self, x):
        self.add_loss(0.1 * ops.mean(ops.square(x)))
        return x


def two_heads():
    """Tokens and topics, a regularizer, and a loss of a layer."""
    keras.utils.set_random_seed(5)
    inputs = keras.Input((TOKENS, 4))
    hidden = keras.layers.Dense(8, "tanh", kernel_regularizer=keras.regularizers.L2(0.01))(inputs)
    hidden = Penalized()(hidden)
    outputs = {
        "tokens": kx.layers.LogitsDense(CLASSES, name="tokens")(hidden),
        "topics": keras.layers.Dense(3, name="topics", kernel_regularizer="l2")(ops.mean(hidden, axis=1)),
    }
    return keras.Model(inputs, outputs)


def scaled(rate):
    return keras.optimizers.LossScaleOptimizer(SGD(rate), initial_scale=2.0**10)


SWEEP = {
    "class weights": ({"class_weight": ALL_OPTIONS["class_weight"]}, SGD),
    "z-loss": ({"z_loss": 1e-2}, SGD),
    "class weights, z-loss, smoothing, cap": (ALL_OPTIONS, SGD),
    "clipped by value": ({}, lambda rate: SGD(rate, clipvalue=0.01)),
    "clipped by norm": ({}, lambda rate: SGD(rate, clipnorm=0.02)),
    "clipped by global norm": ({"z_loss": 1e-2}, lambda rate: SGD(rate, global_clipnorm=0.05)),
    "scaled": (ALL_OPTIONS, scaled),
    "momentum and decay": ({}, lambda rate: SGD(rate, momentum=0.9, weight_decay=0.01)),
    "averages": ({}, lambda rate: SGD(rate, use_ema=True, ema_momentum=0.5)),
}


@whole
@pytest.mark.parametrize("case, weighted", [*((case, True) for case in SWEEP), ("scaled", False)])
def test_the_whole_step_of_two_outputs_is_that_of_the_batch(case, weighted):
    """Losses weighed against each other, regularizers and a layer's loss, and a last batch of three rows."""
    options, optimizer = SWEEP[case]
    _, labels, weights = data(LAST)
    topics = np.random.default_rng(6).integers(-1, 2, (len(labels), 3)).astype("float32")

    def after(steps):
        model = two_heads()
        losses = {
            "tokens": kx.losses.MaskedSequenceCrossentropy(ignore_class=0, **options),
            "topics": kx.losses.BinaryCrossentropy(from_logits=True, ignore_class=-1),
        }
        model.compile(optimizer(0.5), losses, loss_weights={"tokens": 0.7, "topics": 0.3})
        model = kx.accumulate_gradients(model, steps)
        given = {"tokens": weights, "topics": weights[::-1].copy()} if weighted else None
        rows = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "verbose": 0}
        before = model.get_weights()
        y = {"tokens": labels, "topics": topics}
        history = model.fit(features(len(labels)), y, sample_weight=given, **rows).history
        return before, model.get_weights(), history["loss"]

    before, expected, expected_loss = after(1)
    _, accumulated, loss = after(3)
    assert distance(expected, before) > 1e-2
    assert distance(accumulated, expected) < 1e-6
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
