"""Distributions as targets of a head: the same as the dense cross-entropy of the logits, without them."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from keras_xent.kernels import _compiled, soft_targets
from tests.backend import TWO_MODES, to_numpy, value_and_gradient
from tests.internals import set_sizes
from tests.tiers import fast_for, whole

TOKENS, FEATURES, CLASSES = 22, 5, 12
RNG = np.random.default_rng(0)
HIDDEN = RNG.standard_normal((TOKENS, FEATURES)).astype("float32")
KERNEL = RNG.standard_normal((FEATURES, CLASSES)).astype("float32")
BIAS = RNG.standard_normal(CLASSES).astype("float32")
TARGETS = RNG.dirichlet(np.ones(CLASSES), TOKENS).astype("float32")
TARGETS[3] = 0.0
MASK = RNG.random(TOKENS) > 0.4
WEIGHTS = RNG.random(TOKENS).astype("float32")
OPTIONS = {
    "plain": {},
    "all": {"label_smoothing": 0.1, "class_weight": np.linspace(0.5, 2, CLASSES), "z_loss": 0.01, "logit_softcap": 2.0},
}


@pytest.fixture
def small_chunks(monkeypatch):
    set_sizes(monkeypatch.setattr, fewest_rows=2, chunk_bytes=4 * CLASSES * 2 * 4)


@fast_for("False-all-False")
@pytest.mark.parametrize("transpose", [False, pytest.param(True, marks=pytest.mark.whole)])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_loss_of_the_logits(small_chunks, options, masked, transpose):
    targets, options = TARGETS.copy(), OPTIONS[options]
    mask = MASK if masked else None
    if masked:
        targets[~MASK] = np.nan
    kernel = KERNEL.T if transpose else KERNEL
    sizes = np.cumsum([HIDDEN.size, KERNEL.size])

    def parts(flat):
        hidden, matrix, bias = (flat[i:j] for i, j in zip((0, *sizes), (*sizes, None), strict=True))
        return ops.reshape(hidden, HIDDEN.shape), ops.reshape(matrix, kernel.shape), bias

    def fused(flat):
        hidden, matrix, bias = parts(flat)
        return kx.kernels.linear_softmax_cross_entropy(
            hidden,
            matrix,
            targets,
            bias,
            transpose_kernel=transpose,
            mask=mask,
            token_weights=WEIGHTS,
            reduction="token_mean",
            **options,
        )

    def dense(flat):
        hidden, matrix, bias = parts(flat)
        logits = ops.matmul(hidden, ops.transpose(matrix) if transpose else matrix) + bias
        losses = kx.kernels.softmax_cross_entropy(targets, logits, mask=mask, **options)
        class_weights = options.get("class_weight", np.ones(CLASSES))
        row_weights = np.nan_to_num(targets) @ class_weights * WEIGHTS
        return ops.sum(losses * WEIGHTS) / np.sum(row_weights * (MASK if masked else 1.0))

    flat = np.concatenate([HIDDEN.ravel(), kernel.ravel(), BIAS])
    expected = value_and_gradient(dense, ops.convert_to_tensor(flat))
    found = value_and_gradient(fused, ops.convert_to_tensor(flat), mode=TWO_MODES[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-6)
    np.testing.assert_allclose(found[1], expected[1], atol=2e-6 * np.abs(expected[1]).max())


def test_losses_without_reduction_keep_their_shape(small_chunks):
    hidden, targets = HIDDEN.reshape(2, 11, FEATURES), TARGETS.reshape(2, 11, CLASSES)
    losses = kx.kernels.linear_softmax_cross_entropy(hidden, KERNEL, targets)
    expected = kx.kernels.softmax_cross_entropy(targets, hidden @ KERNEL)
    np.testing.assert_allclose(to_numpy(losses), to_numpy(expected), rtol=2e-6, atol=1e-6)
    assert losses.shape == (2, 11) and float(losses[0, 3]) == 0.0


@pytest.mark.whole
def test_one_hot_targets_are_labels():
    labels = RNG.integers(0, CLASSES, TOKENS)
    of_targets = kx.kernels.linear_softmax_cross_entropy(HIDDEN, KERNEL, np.eye(CLASSES, dtype="int32")[labels])
    of_labels = kx.kernels.linear_cross_entropy(HIDDEN, KERNEL, labels)
    np.testing.assert_allclose(to_numpy(of_targets), to_numpy(of_labels), rtol=2e-6, atol=1e-6)


def test_targets_that_do_not_fit():
    with pytest.raises(ValueError, match=r"`targets` must have the shape of `hidden` .* Received: .* \(22, 11\)"):
        kx.kernels.linear_softmax_cross_entropy(HIDDEN, KERNEL, TARGETS[:, 1:])


@whole
@pytest.mark.parametrize("activation", [None, "softmax"])
def test_the_loss_of_a_model_goes_without_the_logits(monkeypatch, activation):
    """As with a `Dense` layer, weights of examples and a mask included."""
    calls, forward = [], soft_targets.SoftTargetRule.forward

    def counted(self, *args):
        calls.append(self)
        return forward(self, *args)

    monkeypatch.setattr(soft_targets.SoftTargetRule, "forward", counted)
    # A program that another test has compiled would not call it.
    _compiled.clear_cache()
    tokens, targets = RNG.integers(0, 9, (4, 5)), RNG.dirichlet(np.ones(9), (4, 5)).astype("float32")
    found = []
    for layer in (kx.layers.LogitsDense, keras.layers.Dense):
        keras.utils.set_random_seed(0)
        head = layer(9, activation=activation)
        model = keras.Sequential([keras.layers.Embedding(9, 4, mask_zero=True), head])
        loss = kx.losses.CategoricalCrossentropy(from_logits=activation is None, label_smoothing=0.1)
        model.compile(keras.optimizers.SGD(0.5), loss)
        history = model.fit(tokens, targets, sample_weight=np.arange(1.0, 5.0), epochs=2, verbose=0).history["loss"]
        found.append([*history, *map(to_numpy, model.weights)])
        is_fused = layer is kx.layers.LogitsDense
        assert bool(calls) == is_fused
        calls.clear()
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)
