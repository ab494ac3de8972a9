"""Small models for the tests of deployment, and what they give in a process that has TensorFlow alone."""

import pathlib
import subprocess
import sys

import keras
import numpy as np

import keras_xent as kx
from tests.backend import environment

VOCABULARY = 50
PLAIN = pathlib.Path(__file__).with_name("plain.py")


def language_model(head=kx.layers.LogitsDense, activation=None, rate=0.1, vocabulary=VOCABULARY, **loss):
    """A causal model with padding 0, compiled but not trained."""
    keras.utils.set_random_seed(0)
    tokens = keras.Input([None], dtype="int32")
    x = keras.layers.Embedding(vocabulary, 16, mask_zero=True)(tokens)
    x = keras.layers.MultiHeadAttention(2, 8)(x, x, use_causal_mask=True)
    x = keras.layers.Dropout(rate)(x)
    model = keras.Model(tokens, head(vocabulary, activation=activation, kernel_initializer="random_normal")(x))
    loss = kx.losses.MaskedSequenceCrossentropy(ignore_class=0, from_logits=activation is None, **loss)
    metric = kx.metrics.Perplexity(from_logits=activation is None, ignore_class=0)
    model.compile(keras.optimizers.Adam(0.05), loss=loss, metrics=[metric])
    return model


def classifier():
    """A compiled model of four classes for eight numbers."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, activation="softmax")])
    model.compile("sgd", loss=kx.losses.SparseCategoricalCrossentropy(label_smoothing=0.1))
    return model


def sequences(batch, length, seed=0):
    """Tokens `[batch, length]`, the rows of uneven length and padded with 0; every fifth row is nothing but padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCABULARY, (batch, length)).astype("int32")
    for i, row in enumerate(tokens):
        row[0 if i % 5 == 4 else rng.integers(min(2, length), length + 1) :] = 0
    return tokens


def in_plain_tensorflow(calls, folder):
    """Results by `(folder, signature, call)` of calls `{(folder, signature, call): inputs}`, in a fresh process."""
    given, gotten = folder / "calls.npz", folder / "results.npz"
    arrays = {"|".join(map(str, (*key, name))): a for key, inputs in calls.items() for name, a in inputs.items()}
    np.savez(given, **arrays)
    variables = environment()
    # Not even to be found.
    del variables["PYTHONPATH"]
    command = [sys.executable, PLAIN, given, gotten]
    run = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = {}
    with np.load(gotten) as arrays:
        for key, array in arrays.items():
            *call, name = key.split("|")
            results.setdefault(tuple(call), {})[name] = array
    return results
