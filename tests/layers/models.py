"""Small language models that end in a head, and how they are trained and compared."""

import keras
import numpy as np

import keras_xent as kx

VOCABULARY, FEATURES, LENGTH = 61, 8, 13


def data(sequences=24):
    """Padded sequences, the next tokens, and weights."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, LENGTH, sequences)[:, None]
    tokens = np.where(np.arange(LENGTH) < lengths, rng.integers(1, VOCABULARY, (sequences, LENGTH)), 0)
    following = np.concatenate([tokens[:, 1:], np.zeros((sequences, 1), int)], axis=1)
    return tokens, following, rng.uniform(0.1, 2, sequences)


def language_model(head, *, tied=False, after=(), **arguments):
    """A model that ends in `head`, the same weights whatever the head is."""
    keras.utils.set_random_seed(0)
    tokens = keras.Input((None,), dtype="int32")
    if tied:
        # No mask: newer versions of Keras lose it at the logits, and Keras 3.12 makes a wrong one there.
        embedding = head(VOCABULARY, FEATURES, **arguments)
        hidden = keras.layers.Dense(FEATURES, activation="tanh")(embedding(tokens))
        logits = embedding(hidden, reverse=True)
    else:
        embedded = keras.layers.Embedding(VOCABULARY, FEATURES, mask_zero=True)(tokens)
        hidden = keras.layers.Dense(FEATURES, activation="tanh")(embedded)
        logits = head(VOCABULARY, **arguments)(hidden)
    for layer in after:
        logits = layer(logits)
    return keras.Model(tokens, logits)


def trained(model, loss, *, metrics=(), weighted_metrics=None, **compile_arguments):
    """The history and weights after two epochs with validation."""
    tokens, following, weights = data()
    model.compile(
        keras.optimizers.Adam(0.01), loss, metrics=list(metrics), weighted_metrics=weighted_metrics, **compile_arguments
    )
    validation = (tokens[:8], following[:8], weights[:8])
    history = model.fit(
        tokens, following, 8, 2, verbose=0, sample_weight=weights, validation_data=validation, shuffle=False
    ).history
    return history, [np.asarray(w) for w in model.get_weights()]


def assert_same_training(one, other, rtol=1e-5):
    assert one[0].keys() == other[0].keys()
    for name, values in one[0].items():
        np.testing.assert_allclose(other[0][name], values, rtol=rtol, err_msg=name)
    for mine, theirs in zip(one[1], other[1], strict=True):
        np.testing.assert_allclose(theirs, mine, atol=rtol)


def loss(**arguments):
    return kx.losses.MaskedSequenceCrossentropy(ignore_class=0, **arguments)


def metrics():
    return [kx.metrics.Perplexity(ignore_class=0), kx.metrics.TokenAccuracy(ignore_class=0)]
