"""Bits per byte: the same for every tokenizer of the same text."""

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests import oracles
from tests.backend import to_numpy
from tests.tiers import sample

CLASSES = 11
BYTES = [0, 1, 1, 2, 3, 3, 4, 5, 1, 7, 2]


def data():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, CLASSES, (12, 6))
    tokens[np.arange(6) >= rng.integers(1, 7, 12)[:, None]] = 0
    return tokens, rng.integers(0, CLASSES, (12, 6)), rng.uniform(size=12)


def of(labels, logits, weights):
    losses = oracles.sparse(labels.reshape(-1), logits.reshape(-1, CLASSES))[0].reshape(labels.shape)
    return (weights * losses).sum() / np.log(2) / (weights * np.array(BYTES)[labels]).sum()


def test_a_uniform_model_needs_the_bits_of_its_choice_for_each_byte():
    metric = kx.metrics.BitsPerByte([2] * 8)
    metric.update_state(np.zeros((2, 3), int), np.zeros((2, 3, 8), "float32"))
    assert float(to_numpy(metric.result())) == pytest.approx(1.5)


@pytest.mark.whole
@pytest.mark.parametrize("head", sample([keras.layers.Dense, kx.layers.LogitsDense], [kx.layers.LogitsDense]))
def test_fit_and_evaluate_report_the_true_value(head):
    """With a mask, ignored labels and sample weights, in ragged batches, with and without logits."""
    inputs, labels, weights = data()
    keras.utils.set_random_seed(0)
    embedding = keras.layers.Embedding(CLASSES, 4, mask_zero=True)
    model = keras.Sequential([keras.Input((6,), dtype="int32"), embedding, head(CLASSES)])
    metrics = [kx.metrics.BitsPerByte(BYTES, ignore_class=3), kx.metrics.Perplexity(ignore_class=3)]
    loss = kx.losses.MaskedSequenceCrossentropy(ignore_class=3)
    model.compile(keras.optimizers.SGD(0.0), loss, weighted_metrics=metrics)
    counts = ((inputs != 0) & (labels != 3)) * weights[:, None]
    expected = of(labels, model.predict(inputs, verbose=0).astype("float64"), counts)
    history = model.fit(inputs, labels, 5, verbose=0, sample_weight=weights).history
    assert history["bits_per_byte"] == pytest.approx([expected], rel=1e-5)
    found = model.evaluate(inputs, labels, 5, verbose=0, sample_weight=weights, return_dict=True)
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_nothing_counted_is_not_a_number():
    assert np.isnan(to_numpy(kx.metrics.BitsPerByte(BYTES, ignore_class=0).result()))


def test_less_is_better_and_every_argument_survives():
    metric = kx.metrics.BitsPerByte(np.array(BYTES), False, 0, 1, "bpb", "float64", logit_softcap=30.0)
    again = keras.metrics.deserialize(keras.metrics.serialize(metric))
    assert isinstance(again, kx.metrics.BitsPerByte)
    assert again.get_config() == metric.get_config()
    assert again.bytes_per_token == BYTES
    assert metric._direction == "down"


def test_tokens_stand_for_their_bytes():
    assert kx.metrics.BitsPerByte(["a", "\u20ac", ""]).bytes_per_token == [1, 3, 0]
    assert kx.metrics.BitsPerByte(["a"] * 30 + ["##b"]).bytes_per_token == [1] * 30 + [3]
    assert kx.metrics.BitsPerByte([b"a", b"\xe2\x82"]).bytes_per_token == [1, 2]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            {"bytes_per_token": [1, -1]},
            r"`bytes_per_token` must hold numbers of at least 0. Received: bytes_per_token=[1, -1].",
        ),
        (
            {"bytes_per_token": None},
            "`bytes_per_token` must be a list with one number for each class, or the tokens themselves. "
            "Received: bytes_per_token=None.",
        ),
        (
            {"bytes_per_token": ["a", "\u0120the"]},
            "`bytes_per_token` must be numbers, or tokens as they stand in a text. Received: tokens as a tokenizer "
            "writes them ('byte_level'). Give bytes_of_tokens(vocabulary).",
        ),
    ],
)
def test_wrong_arguments_are_told(arguments, sentence):
    with pytest.raises(ValueError) as told:
        kx.metrics.BitsPerByte(**arguments)
    assert str(told.value) == sentence


def test_predictions_of_other_classes_are_told():
    with pytest.raises(ValueError) as told:
        kx.metrics.BitsPerByte([1, 2]).update_state(np.zeros((1, 1), int), np.zeros((1, 1, 3), "float32"))
    assert str(told.value) == (
        "`bytes_per_token` must have one number for each class. Received: 2 numbers and predictions of shape (1, 1, 3)."
    )
