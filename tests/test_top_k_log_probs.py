"""The likeliest tokens under models: without logits where the output layer allows it, equal to those from logits."""

import keras
import numpy as np
import pytest

import keras_xent as kx
from keras_xent import _without_logits
from tests.backend import MODES as BACKEND_MODES
from tests.backend import every_mode, tensor, to_numpy
from tests.test_log_probs import MASK, MODELS, TOKENS, VOCABULARY, built

K = 4


def from_predictions(model, temperature, probabilities):
    x = to_numpy(keras.tree.flatten(model(TOKENS))[0])
    x = (np.log(x) if probabilities else x) / temperature
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    ids = np.argsort(-log_p, axis=-1, kind="stable")[..., :K]
    return ids, np.take_along_axis(log_p, ids, -1)


@pytest.mark.parametrize("name", MODELS)
def test_likeliest_tokens_are_those_from_the_predictions(name):
    model = built(name)
    ids, log_probs = from_predictions(model, 1.7, "softmax" in name)
    mine = kx.top_k_log_probs(model, TOKENS, K, mask=MASK, temperature=1.7)
    np.testing.assert_array_equal(to_numpy(mine.ids), np.where(MASK[..., None], ids, -1))
    np.testing.assert_allclose(to_numpy(mine.log_probs), np.where(MASK[..., None], log_probs, 0), atol=2e-6)


@every_mode
def test_the_logits_are_not_computed(mode, monkeypatch):
    model = built("plain Dense")
    expected = from_predictions(model, 1.0, False)
    monkeypatch.setattr(_without_logits, "_of_predictions", None)
    found = BACKEND_MODES[mode](lambda x: tuple(kx.top_k_log_probs(model, x, K)))(tensor(TOKENS))
    np.testing.assert_array_equal(to_numpy(found[0]), expected[0])
    np.testing.assert_allclose(to_numpy(found[1]), expected[1], atol=2e-6)


def test_the_mask_of_the_model_counts():
    model = built("LogitsDense")
    found = kx.top_k_log_probs(model, np.where(MASK, TOKENS, 0), K)
    np.testing.assert_array_equal(to_numpy(found.ids) >= 0, np.broadcast_to(MASK[..., None], (*MASK.shape, K)))


def test_a_student_learns_from_what_was_stored():
    teacher = built("LogitsDense")
    ids, log_probs = kx.top_k_log_probs(teacher, TOKENS, VOCABULARY, temperature=0.1)
    rng = np.random.default_rng(4)
    hidden, kernel = rng.standard_normal((*TOKENS.shape, 6)), rng.standard_normal((6, VOCABULARY))
    inputs = hidden.astype("float32"), kernel.astype("float32")
    loss = kx.kernels.linear_top_k_distillation(*inputs, ids, log_probs, temperature=0.1, reduction="sum")
    log_p, log_q = (x / 0.1 for x in (to_numpy(teacher(TOKENS)), hidden @ kernel))
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (log_p, log_q))
    np.testing.assert_allclose(float(loss), 0.01 * (np.exp(log_p) * (log_p - log_q)).sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("units", "k", "sentence"),
    [(VOCABULARY, VOCABULARY + 1, "`k` must be at most"), (1, 1, "a number for each class"), (3, 1.5, "`k` must be a")],
)
def test_wrong_arguments_are_named(units, k, sentence):
    model = keras.Sequential([keras.layers.Embedding(VOCABULARY, 2), keras.layers.Dense(units)])
    with pytest.raises(ValueError, match=sentence):
        kx.top_k_log_probs(model, TOKENS, k)
