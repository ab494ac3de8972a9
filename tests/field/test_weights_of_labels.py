"""Weights of single labels, and weights and labels that have a class axis of size 1."""

import numpy as np
import pytest

import keras_xent as kx
from tests.backend import TWO_MODES, tensor, value_and_gradient
from tests.tiers import fast_for

rng = np.random.default_rng(0)
X = rng.normal(size=(4, 3)).astype("float32")
Y = rng.integers(0, 2, (4, 3)).astype("float32")
W = rng.uniform(0, 2, (4, 3)).astype("float32")
W[1, 2] = 0.0
ELEMENT = np.log1p(np.exp(-np.abs(X))) + np.maximum(X, 0) - X * Y
SLOPE = 1 / (1 + np.exp(-X)) - Y
MISSING = np.zeros((4, 3), bool)
MISSING[0, 1], MISSING[2] = True, True
KEPT = ~MISSING


def reduced(reduction, element, kept):
    """The value, and the factor of each label's loss in it."""
    count = np.maximum(kept.sum(1, keepdims=True), 1)
    if reduction in ("token_mean", "mean_with_sample_weight"):
        factor = W * kept / (W * kept).sum()
    elif reduction == "sequence_mean":
        sums = (W * kept).sum(1, keepdims=True)
        factor = W * kept / np.where(sums == 0, 1, sums) / kept.any(1).sum()
    else:
        factor = W * kept / count / (1 if reduction == "sum" else kept.any(1).sum())
    return (factor * element).sum(), factor


@fast_for("True-*")
@pytest.mark.parametrize("mode", TWO_MODES)
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "token_mean", "sequence_mean"])
@pytest.mark.parametrize("missing", [False, True])
def test_weights_of_labels_are_applied_before_the_mean_over_labels(missing, reduction, mode):
    kept = KEPT if missing else np.ones((4, 3), bool)
    y = np.where(kept, Y, -1)
    loss = kx.losses.BinaryCrossentropy(from_logits=True, reduction=reduction, ignore_class=-1 if missing else None)
    value, gradient = value_and_gradient(lambda x: loss(y, x, W), tensor(X), mode=mode)
    right, factor = reduced(reduction, ELEMENT, kept)
    np.testing.assert_allclose(value, right, rtol=2e-6)
    np.testing.assert_allclose(gradient, factor * SLOPE, rtol=2e-6, atol=1e-7)


def test_a_label_under_weight_0_may_be_anything():
    y, x = Y.copy(), X.copy()
    y[1, 2], x[1, 2] = 99.0, np.nan
    loss = kx.losses.BinaryCrossentropy(from_logits=True)
    value, gradient = value_and_gradient(lambda x: loss(y, x, W), tensor(x))
    np.testing.assert_allclose(value, (W * ELEMENT).sum() / 12 - 0.0, rtol=2e-6)
    assert np.isfinite(gradient).all() and gradient[1, 2] == 0


def test_weights_of_examples_are_what_they_were():
    loss = kx.losses.BinaryCrossentropy(from_logits=True)
    right = (W[:, 0] * ELEMENT.mean(1)).mean()
    for weights in W[:, 0], W[:, :1]:
        np.testing.assert_allclose(float(loss(Y, X, weights)), right, rtol=2e-6)


def test_weights_may_have_the_class_axis_of_the_labels():
    x = rng.normal(size=(2, 5, 3, 4)).astype("float32")
    y, w = rng.integers(0, 5, (2, 1, 3, 4)), rng.uniform(size=(2, 1, 3, 4)).astype("float32")
    loss = kx.losses.SparseCategoricalCrossentropy(from_logits=True, axis=1)
    np.testing.assert_allclose(float(loss(y, x, w)), float(loss(y[:, 0], x, w[:, 0])), rtol=1e-6)
    with pytest.raises(ValueError, match=r"For one weight per example give shape \[batch\]; for one per element the"):
        loss(y, x, w[:, 0, :2])
