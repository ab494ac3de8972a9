"""The shapes that tools/bench measures, few rows of each: the kernels against float64 NumPy."""

import numpy as np
import pytest

from keras_xent.kernels import _token_chunks, linear_cross_entropy, sparse_softmax_cross_entropy
from tests.backend import tensor, to_numpy, value_and_gradient
from tests.internals import chunks
from tests.tiers import sample
from tools.bench.shapes import GPT2, HEADS, SHAPES, WORD_PIECES

ROWS = 3


def by_numpy(labels, logits):
    """Losses and gradients of rows."""
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    target = np.arange(logits.shape[1]) == labels[:, None]
    return -log_p[target], np.exp(log_p) - target


@pytest.mark.parametrize("dtype, error", [("float32", 1e-6), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("shape", sample(SHAPES, SHAPES[:1], one_argument=True), ids=lambda shape: shape.name)
def test_the_losses_of_a_real_shape(shape, dtype, error):
    rng = np.random.default_rng(0)
    logits = tensor(rng.normal(0, 3, (ROWS, shape.classes)).astype("float32"), dtype)
    labels = rng.integers(0, shape.classes, ROWS)
    labels[0], labels[1] = 0, shape.classes - 1
    found, slopes = value_and_gradient(lambda x: sparse_softmax_cross_entropy(tensor(labels), x), logits)
    losses, gradients = by_numpy(labels, to_numpy(logits))
    np.testing.assert_allclose(found, losses, rtol=2e-6)
    np.testing.assert_allclose(slopes, gradients, rtol=0, atol=error * np.abs(gradients).max())


@pytest.mark.parametrize("head", sample(HEADS, HEADS[:1], one_argument=True), ids=lambda head: head.name)
def test_the_head_of_a_real_shape(head):
    rng = np.random.default_rng(0)
    hidden = rng.normal(0, 1, (ROWS, head.features)).astype("float32")
    kernel = rng.normal(0, 2 / np.sqrt(head.features), (head.features, head.classes)).astype("float32")
    labels = np.array([0, head.classes - 1, 1])
    found, slopes = value_and_gradient(
        lambda h: linear_cross_entropy(h, tensor(kernel), tensor(labels), reduction="token_mean"), tensor(hidden)
    )
    losses, gradients = by_numpy(labels, hidden.astype("float64") @ kernel.astype("float64"))
    for_hidden = gradients @ kernel.T.astype("float64") / ROWS
    np.testing.assert_allclose(found, losses.mean(), rtol=2e-6)
    # Of 150 draws of three tokens the worst is 5.5e-7 off, and 5.2e-7 by the naive formula.
    assert np.linalg.norm(slopes - for_hidden) <= 7e-7 * np.linalg.norm(for_hidden)


@pytest.mark.parametrize("tokens, classes", [(GPT2.tokens, GPT2.classes), (WORD_PIECES.tokens, WORD_PIECES.classes)])
def test_masked_tokens_get_chunks_that_can_be_left_out(tokens, classes, monkeypatch):
    monkeypatch.setattr(_token_chunks, "on_accelerator", lambda: False)
    size, number = chunks(tokens, classes, is_masked=True)
    assert number > 1 and size * (number - 1) < tokens <= size * number
    assert chunks(tokens, classes, is_masked=False)[1] <= number
