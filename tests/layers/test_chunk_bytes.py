"""The budget of a head: the same loss in smaller chunks, and the argument in the configuration."""

import functools

import keras
import numpy as np
import pytest

import keras_xent as kx
from keras_xent.kernels import _token_chunks
from tests.backend import to_numpy

TOKENS = np.random.default_rng(0).integers(0, 50, (4, 30))


def test_a_budget_is_kept_to():
    assert _token_chunks.chunk_sizes(1000, 50, is_masked=False) == (1000, 1)
    size, chunks = _token_chunks.chunk_sizes(1000, 50, is_masked=False, chunk_bytes=4 * 50 * 64)
    assert size <= 64 and size * chunks >= 1000
    size, _ = _token_chunks.chunk_sizes(1000, 50, is_masked=False, copies=2, chunk_bytes=4 * 50 * 64)
    assert size <= 32
    # One token at least.
    assert _token_chunks.chunk_sizes(1000, 50, is_masked=False, chunk_bytes=1)[0] == 1


@pytest.mark.parametrize("features", [64, 256, 768])
def test_of_few_tokens_a_chunk_takes_a_quarter_of_the_gradient(features, monkeypatch):
    monkeypatch.setattr(_token_chunks, "on_accelerator", lambda: False)
    classes = 2**20 // features * 128  # as large a kernel each time: 512 MB
    size, _ = _token_chunks.chunk_sizes(2048, classes, is_masked=True, features=features)
    share = _token_chunks.CPU_CHUNK_BYTES / 4
    assert 4 * classes * size <= max(4 * classes * max(features / 4, 2048 / 32), share) * 1.05
    # The more tokens, the more each pass over that gradient has to be worth.
    assert _token_chunks.chunk_sizes(4096, classes, is_masked=True, features=features)[0] >= 512


def test_on_an_accelerator_chunks_are_larger_and_no_larger_than_the_gradient_of_the_kernel(monkeypatch):
    monkeypatch.setattr(_token_chunks, "on_accelerator", lambda: True)
    sizes = functools.partial(_token_chunks.chunk_sizes, is_masked=False)
    assert sizes(8192, 32_000, features=2048) == (2048, 4)
    assert sizes(4096, 128_256, features=4096) == (2048, 2)
    assert sizes(8192, 262_144, features=640) == (1024, 8)
    # Masked tokens are left out by whole chunks, of which there are more then.
    assert sizes(4096, 128_256, features=4096, is_masked=True) == (1024, 4)


def tied(chunk_bytes):
    embedding = kx.layers.TiedLogits(50, 8, chunk_bytes=chunk_bytes)
    tokens = keras.Input((None,), dtype="int32")
    return keras.Model(tokens, embedding(embedding(tokens), reverse=True))


def dense(chunk_bytes):
    return keras.Sequential([keras.layers.Embedding(50, 8), kx.layers.LogitsDense(50, chunk_bytes=chunk_bytes)])


@pytest.mark.whole
@pytest.mark.parametrize("build", [tied, dense])
def test_training_is_the_same_with_any_budget(build):
    losses = []
    for chunk_bytes in (None, 4 * 50 * 7):
        keras.utils.set_random_seed(0)
        model = build(chunk_bytes)
        model.compile(keras.optimizers.Adam(0.01), kx.losses.MaskedSequenceCrossentropy())
        losses.append(model.fit(TOKENS, TOKENS, epochs=3, verbose=0).history["loss"])
        log_probs = to_numpy(kx.token_log_probs(model, TOKENS, TOKENS))
        assert log_probs.mean() == pytest.approx(-model.evaluate(TOKENS, TOKENS, verbose=0), rel=1e-4)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_it_is_a_part_of_the_configuration():
    for layer in (kx.layers.LogitsDense(50, chunk_bytes=1000), kx.layers.TiedLogits(50, 8, chunk_bytes=1000)):
        assert type(layer).from_config(layer.get_config()).chunk_bytes == 1000
    with pytest.raises(ValueError, match="`chunk_bytes` must be a whole number of at least 1"):
        kx.layers.LogitsDense(50, chunk_bytes=0)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "1MB"])
def test_a_chunk_of_no_size_is_refused_by_kernels(wrong):
    with pytest.raises(ValueError, match="`chunk_bytes` must be a whole number of at least 1. Received: chunk_bytes="):
        kx.kernels.linear_token_statistics(np.ones((2, 3)), np.ones((3, 4)), [0, 1], chunk_bytes=wrong)
