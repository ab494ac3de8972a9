"""Gradient accumulation on uneven tokens, by the recipe of docs/scaling.md: the weights are those of whole batches."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests.scaling.training import data
from tests.tiers import sample

tf = pytest.importorskip("tensorflow")
PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
WHOLE, PARTS = 4, 4


def recipe():
    """The function that the page defines."""
    names = {"tf": tf, "PADDING": 0}
    exec(re.search(r"^def with_shares.*?(?=\n\n\n)", PAGE.read_text(), re.DOTALL | re.MULTILINE)[0], names)
    return names["with_shares"](PARTS)


def in_parts(batches):
    return batches.rebatch(WHOLE // PARTS).apply(tf.data.experimental.assert_cardinality(PARTS * len(batches)))


def whole_batches():
    """Features in place of an embedding, whose gradient Keras' Adam squares place by place on TensorFlow."""
    _, labels, _ = data()
    features = np.random.default_rng(0).standard_normal((*labels.shape, 4)).astype("float32")
    return tf.data.Dataset.from_tensor_slices((features, labels)).batch(WHOLE)


def trained(batches, loss, optimizer):
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((12, 4)), kx.layers.LogitsDense(62)])
    model.compile(optimizer, loss, metrics=[kx.metrics.Perplexity(ignore_class=0)])
    history = model.fit(batches, epochs=2, verbose=0).history
    return model.get_weights(), history


def distance(ours, theirs):
    return max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("optimizer", sample([keras.optimizers.SGD, keras.optimizers.Adam], [keras.optimizers.SGD]))
def test_micro_batches_with_shares_train_as_whole_batches(optimizer):
    batches = whole_batches()
    loss = kx.losses.MaskedSequenceCrossentropy(ignore_class=0)
    expected, logged = trained(batches, loss, optimizer(0.05))
    of_means, _ = trained(in_parts(batches), loss, optimizer(0.05, gradient_accumulation_steps=PARTS))

    shared = kx.losses.MaskedSequenceCrossentropy(ignore_class=0, reduction="sum")
    micro = in_parts(batches.map(recipe()))
    weights, history = trained(micro, shared, optimizer(0.05, gradient_accumulation_steps=PARTS))
    assert distance(weights, expected) < 1e-6
    assert distance(of_means, expected) > 1e-2
    for name, value in logged.items():
        np.testing.assert_allclose(history[name], value, rtol=1e-5)


def test_a_fixed_normalizer_is_the_same_in_parts_and_whole():
    batches = whole_batches()
    whole = kx.losses.MaskedSequenceCrossentropy(ignore_class=0, normalizer=12.0)
    parts = kx.losses.MaskedSequenceCrossentropy(ignore_class=0, normalizer=12.0 / PARTS)
    expected, _ = trained(batches, whole, keras.optimizers.SGD(0.05))
    optimizer = keras.optimizers.SGD(0.05, gradient_accumulation_steps=PARTS)
    weights, _ = trained(in_parts(batches), parts, optimizer)
    assert distance(weights, expected) < 1e-6
