"""The mean cross-entropy per token, and Keras' `loss` replaced by it."""

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests import oracles
from tests.backend import BACKEND
from tests.tiers import sample


def batches():
    """Three batches of two sequences, with 7, 1 and 0 tokens that count, of unlike difficulty."""
    rng = np.random.default_rng(3)
    hidden = (rng.standard_normal((6, 4, 3)) * np.repeat([1, 8, 1], 2)[:, None, None]).astype("float32")
    labels = rng.integers(1, 5, (6, 4))
    labels[[0, 2, 2, 2]] *= np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
    labels[3:] = 0
    return hidden, labels


@pytest.mark.whole
@pytest.mark.parametrize("head", sample([keras.layers.Dense, kx.layers.LogitsDense], [kx.layers.LogitsDense]))
def test_a_metric_named_loss_replaces_the_loss_that_keras_logs(head):
    """The token mean of the epoch, where Keras has the mean of the batches' means."""
    hidden, labels = batches()
    model = keras.Sequential([keras.Input((4, 3)), head(5)])
    # No step: train and validation are of the same weights.
    loss = kx.losses.MaskedSequenceCrossentropy(ignore_class=0, label_smoothing=0.1)
    metrics = [kx.metrics.TokenCrossentropy(ignore_class=0, name="loss"), kx.metrics.Perplexity(ignore_class=0)]
    model.compile(keras.optimizers.SGD(0.0), loss, metrics=metrics)
    history = model.fit(
        hidden, labels, 2, shuffle=False, validation_data=(hidden, labels), validation_batch_size=3, verbose=0
    ).history
    counts = labels != 0
    losses, _ = oracles.sparse(labels[counts], model.predict(hidden, verbose=0)[counts])
    expected = losses.mean()
    for name in "loss", "val_loss":
        np.testing.assert_allclose(history[name], [expected], rtol=2e-6)
    np.testing.assert_allclose(history["perplexity"], np.exp([expected]), rtol=1e-5)
    evaluated = model.evaluate(hidden, labels, batch_size=2, verbose=0, return_dict=True)
    np.testing.assert_allclose(evaluated["loss"], expected, rtol=2e-6)


def test_without_valid_tokens_the_result_is_nan():
    metric = kx.metrics.TokenCrossentropy(ignore_class=0)
    metric.update_state(np.zeros((2, 3), int), np.zeros((2, 3, 4), "float32"))
    assert np.isnan(float(metric.result()))


def test_every_argument_survives_the_configuration():
    dtype = "float64" if BACKEND == "tensorflow" else "float32"
    metric = kx.metrics.TokenCrossentropy(False, 3, 1, name="nats", dtype=dtype, logit_softcap=30.0)
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(metric))
    assert copy.get_config() == metric.get_config()
    assert (copy.from_logits, copy.ignore_class, copy.axis, copy.name) == (False, 3, 1, "nats")
    assert (copy.dtype, copy.logit_softcap) == (dtype, 30.0)
