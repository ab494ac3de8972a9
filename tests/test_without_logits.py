"""Calls of models without their logits leave them as one plain call does: state, losses and programs."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from tests.backend import BACKEND, MODES, every_mode, to_numpy
from tests.test_log_probs import LABELS, TOKENS, VOCABULARY, WIDTH, sequential, values_and_gradients


class Stateful(keras.Model):
    """A model with averages of batches, dropout, and perhaps something made from the logits."""

    def __init__(self, end):
        super().__init__()
        self.embedding, self.head = keras.layers.Embedding(VOCABULARY, WIDTH), kx.layers.LogitsDense(VOCABULARY)
        self.normalization, self.dropout = keras.layers.BatchNormalization(), keras.layers.Dropout(0.5, seed=3)
        self.end = end

    def call(self, x, training=None):
        hidden = self.normalization(self.embedding(x), training=training)
        return self.end(self, self.head(self.dropout(hidden, training=training)))


def with_loss(model, logits):
    model.add_loss(ops.mean(ops.square(logits)))
    return logits


ENDS = {
    "plain": lambda model, logits: logits,
    "scaled": lambda model, logits: logits * np.linspace(0.5, 2, VOCABULARY).astype("float32"),
    "sliced": lambda model, logits: logits[..., 5:] if logits.shape[-1] == VOCABULARY else 1 / 0,
    "with a loss": with_loss,
}


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def stateful(end):
    keras.utils.set_random_seed(1)
    model = Stateful(ENDS[end])
    model(TOKENS)
    return model


@pytest.mark.parametrize("end", ENDS)
def test_state_and_losses_are_those_of_one_call(end):
    called, asked = stateful(end), stateful(end)
    logits, labels = to_numpy(called(TOKENS, training=True)), LABELS % (VOCABULARY - 5)
    expected = np.take_along_axis(log_softmax(logits), labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(to_numpy(kx.token_log_probs(asked, TOKENS, labels, training=True)), expected, atol=2e-6)
    for one, other in zip(asked.non_trainable_variables, called.non_trainable_variables, strict=True):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))
    assert len(asked.losses) == len(called.losses) == (end == "with a loss")
    for one, other in zip(asked.losses, called.losses, strict=True):
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), rtol=1e-6)


@every_mode
@pytest.mark.parametrize("end", ["activity regularizer", "with a loss"])
def test_losses_of_the_logits_have_their_gradient(end, mode):
    if end == "with a loss":
        model = stateful(end)
    else:
        model = sequential(keras.layers.Dense(VOCABULARY, activity_regularizer=keras.regularizers.L2(0.1)))
        model(TOKENS)

    def asked():
        log_probs = kx.token_log_probs(model, TOKENS, LABELS)
        return ops.sum(log_probs) + sum(model.losses), log_probs

    def called():
        all_log_probs = ops.log_softmax(model(TOKENS))
        log_probs = ops.take_along_axis(all_log_probs, LABELS[..., None], axis=-1)[..., 0]
        return ops.sum(log_probs) + sum(model.losses), log_probs

    (found, slopes), (expected, expected_slopes) = (
        values_and_gradients(model, function, MODES[mode]) for function in (asked, called)
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for one, other in zip(slopes, expected_slopes, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * np.abs(other).max())


class OfProgram(keras.Model):
    """A model whose output layer is called in a program that the model keeps."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = keras.layers.Embedding(VOCABULARY, WIDTH), kx.layers.LogitsDense(VOCABULARY)
        self.program = MODES["jit" if BACKEND == "jax" else "graph"](self.head)

    def call(self, x):
        return self.program(self.embedding(x))


def test_a_program_that_a_model_keeps_gives_logits():
    model = OfProgram()
    model.head.build((None, None, WIDTH))
    log_probs = to_numpy(kx.token_log_probs(model, TOKENS, LABELS))
    logits = to_numpy(model(TOKENS))
    expected = np.take_along_axis(log_softmax(logits), LABELS[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_probs, expected, atol=2e-6)
