"""Masks, weights and reductions: each a formula, each the same as in Keras where Keras has it."""

import itertools
import math

import keras
import numpy as np
import pytest

import keras_xent as kx
from tests.losses import reference
from tests.losses.cases import ARGUMENTS, CLASSES, DROP_INS, NAMES, SPARSE, arguments, example, formula, make
from tests.losses.running import assert_close, run, value
from tests.tiers import fast_for, sample

every_loss = pytest.mark.parametrize("name", NAMES)
KERAS_REDUCTIONS = ("sum_over_batch_size", "mean", "mean_with_sample_weight", "sum", "none", None)
REDUCTIONS = (*KERAS_REDUCTIONS, "token_mean", "sequence_mean")

KERAS_WEIGHTS = {
    "no weights": lambda shape, rng: None,
    "a number": lambda shape, rng: np.float32(1.7),
    "[B]": lambda shape, rng: rng.uniform(0.5, 2, shape[:1]).astype("float32"),
    "[B, 1]": lambda shape, rng: rng.uniform(0.5, 2, (shape[0], 1)).astype("float32"),
    "[B, T]": lambda shape, rng: rng.integers(0, 3, shape).astype("float32"),
}


# The weights that Keras takes for losses of a shape.
KERAS_SHAPES = [
    *[((4,), weights) for weights in KERAS_WEIGHTS if weights != "[B, T]"],
    *[((4, 3), weights) for weights in KERAS_WEIGHTS if weights != "[B]"],
]


@fast_for("Sparse*-sum_over_batch_size")
@pytest.mark.parametrize("reduction", KERAS_REDUCTIONS)
@pytest.mark.parametrize("name", DROP_INS)
def test_reductions_of_keras_agree_with_keras(name, reduction):
    """With all shapes of losses and weights, with and without a mask."""
    theirs = getattr(keras.losses, name)(from_logits=True, reduction=reduction)
    ours = getattr(kx.losses, name)(from_logits=True, reduction=reduction)
    for (shape, how), masked in itertools.product(KERAS_SHAPES, (False, True)):
        rng = np.random.default_rng(1)
        labels, logits = example(name, shape, missing=False)
        weights = KERAS_WEIGHTS[how](shape, rng)
        mask = rng.random(shape) < 0.7 if masked else None
        if reduction == "mean_with_sample_weight" and weights is not None:
            # Keras divides by the sum of the weights as they came, so one number for all of them would not be a mean.
            aligned = weights.reshape(shape) if np.size(weights) == shape[0] and len(shape) == 1 else weights
            weights = np.array(np.broadcast_to(aligned, shape))
        result = value(ours, labels, logits, weights, mask)
        expected = value(theirs, labels, logits, weights, mask)
        # Without reduction, weights [B, 1] turn Keras' losses [B] into [B, 1].
        assert_close(result, expected.reshape(result.shape), rtol=3e-6, case=(shape, how, masked))
        assert result.shape == (shape if reduction in (None, "none") else ())


WEIGHTS = {
    **KERAS_WEIGHTS,
    "some zero": lambda shape, rng: np.array([1.5, 0.0, 2.0, 1.0], "float32"),
    "integers": lambda shape, rng: rng.integers(0, 4, shape),
    "booleans": lambda shape, rng: rng.random(shape) < 0.5,
}


@fast_for("*-token_mean", "*-sequence_mean", "*-sum_over_batch_size")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@every_loss
def test_reductions_are_their_formulas(name, reduction):
    """With class weights and missing labels, and all shapes of weights, with and without a mask; value and gradient."""
    options = arguments(name)
    labels, logits = example(name)
    losses, gradients, labelled, label_weights = reference.elements(name, labels, logits, **formula(options))
    loss = make(name, **options, reduction=reduction)
    for how, masked in itertools.product(WEIGHTS, (False, True)):
        rng = np.random.default_rng(2)
        weights = WEIGHTS[how]((4, 3), rng)
        mask = rng.random((4, 3)) < 0.7 if masked else None
        valid = labelled if mask is None else labelled & mask
        aligned = 1.0 if weights is None else np.asarray(weights, np.float64)
        aligned = aligned[:, None] if np.shape(aligned) == (4,) else aligned
        c = reference.coefficients(reduction, valid, aligned, label_weights)
        result, gradient = run(loss, labels, logits, weights, mask)
        assert_close(result, c * losses if reduction in (None, "none") else (c * losses).sum(), case=(how, masked))
        assert_close(gradient, c[..., None] * gradients, scale=1e-6, case=(how, masked))


@fast_for("token_mean", "sequence_mean")
@pytest.mark.parametrize("reduction", [r for r in REDUCTIONS if r not in (None, "none")])
def test_a_normalizer_takes_the_place_of_the_denominator(reduction):
    labels, logits = example("MaskedSequenceCrossentropy")
    weights = np.array([1.5, 0.0, 2.0, 1.0], "float32")
    losses, gradients, labelled, _ = reference.elements("MaskedSequenceCrossentropy", labels, logits, ignore_class=0)
    c = reference.coefficients(reduction, labelled, weights[:, None], normalizer=7.0)
    loss = kx.losses.MaskedSequenceCrossentropy(ignore_class=0, normalizer=7.0, reduction=reduction)
    result, gradient = run(loss, labels, logits, weights)
    assert_close(result, (c * losses).sum())
    assert_close(gradient, c[..., None] * gradients, scale=1e-6)


@fast_for("Masked*")
@every_loss
def test_one_weight_for_all_means_what_the_same_weight_written_out_means(name):
    labels, logits = example(name)
    for reduction in REDUCTIONS:
        loss = make(name, **arguments(name), reduction=reduction)
        expected = value(loss, labels, logits, np.full((4, 3), 1.7, "float32"))
        for short in (1.7, np.full((4,), 1.7, "float32"), np.full((4, 1), 1.7, "float32")):
            assert_close(value(loss, labels, logits, short), expected, case=(reduction, np.shape(short)))


def test_masks_of_examples_and_masks_of_labels_of_the_binary_loss():
    """`[B]` for losses `[B]` masks examples; `[B, L]` masks single labels: the mean is that of the labels left."""
    labels, logits = example("BinaryCrossentropy", (4,), missing=False)
    loss = kx.losses.BinaryCrossentropy(from_logits=True)
    single, *_ = reference.elements("BinaryCrossentropy", labels.reshape(-1, 1), logits.reshape(-1, 1))
    single = single.reshape(4, CLASSES)
    examples = np.array([True, False, True, True])
    assert_close(value(loss, labels, logits, mask=examples), single[examples].mean())
    some = np.random.default_rng(3).random((4, CLASSES)) < 0.6
    some[2] = False
    left = [single[i][some[i]].mean() for i in (0, 1, 3)]
    assert_close(value(loss, labels, logits, mask=some), np.mean(left))


# Nothing valid, nothing there

POISON = (math.nan, math.inf, -math.inf)

NOTHING = {
    "masked": lambda labels: {"mask": np.zeros((4, 3), bool)},
    "weight 0": lambda labels: {"sample_weight": np.zeros((4, 3), "float32")},
    "weight 0 for each example": lambda labels: {"sample_weight": np.zeros((4,), "float32")},
    "weight 0 for all": lambda labels: {"sample_weight": 0.0},
    "no label": lambda labels: {},
}
NOTHING_CASES = [
    (name, how) for name in NAMES for how in NOTHING if how != "no label" or "ignore_class" in ARGUMENTS[name]
]


@pytest.mark.parametrize("name, how", NOTHING_CASES)
def test_nothing_valid_gives_loss_0_and_gradient_0_exactly(name, how):
    """Under what does not count lie finite, infinite and NaN logits."""
    labels, logits = example(name)
    if how == "no label":
        labels = np.full_like(labels, ARGUMENTS[name]["ignore_class"])
    logits[1], logits[2], logits[3] = POISON
    for reduction in REDUCTIONS:
        loss = make(name, **arguments(name), reduction=reduction)
        result, gradient = run(loss, labels, logits, **NOTHING[how](labels))
        assert np.array_equal(result, np.zeros((4, 3) if reduction in (None, "none") else ())), reduction
        assert np.array_equal(gradient, np.zeros(logits.shape)), reduction


WAYS_NOT_TO_COUNT = [
    *[(name, how) for name in NAMES for how in ("mask", "sample_weight")],
    *[(name, "ignore_class") for name in NAMES if "ignore_class" in ARGUMENTS[name]],
]


@pytest.mark.parametrize("name, how", WAYS_NOT_TO_COUNT)
def test_logits_of_masked_elements_leave_no_trace(name, how):
    labels, logits = example(name, missing=False)
    counts = np.ones((4, 3), bool)
    counts[0, 0] = counts[1, 2] = counts[3] = False
    arrays = {}
    if how == "ignore_class":
        labels[~counts] = ARGUMENTS[name]["ignore_class"]
    else:
        arrays[how] = counts if how == "mask" else counts.astype("float32")
    loss = make(name, **arguments(name), reduction="sum")
    clean, clean_gradient = run(loss, labels, np.where(counts[..., None], logits, np.float32(0)), **arrays)
    poisoned = logits.copy()
    poisoned[~counts] = np.resize(np.float32(POISON), (5, 1))
    result, gradient = run(loss, labels, poisoned, **arrays)
    assert result == clean != 0
    assert np.array_equal(gradient, clean_gradient)
    assert np.array_equal(gradient[~counts], np.zeros_like(gradient[~counts]))


@every_loss
def test_labels_of_masked_elements_may_be_anything(name):
    labels, logits = example(name, missing=False)
    mask = np.ones((4, 3), bool)
    mask[1] = False
    garbage = labels.copy()
    garbage[1] = 99
    loss = make(name, from_logits=True)
    assert value(loss, garbage, logits, mask=mask) == value(loss, labels, logits, mask=mask)
    weights = mask.astype("float32")
    assert value(loss, garbage, logits, weights) == value(loss, labels, logits, weights)


@pytest.mark.parametrize("reduction", sample(REDUCTIONS, ["token_mean"]))
@every_loss
def test_an_empty_batch_has_loss_0(name, reduction):
    loss = make(name, **arguments(name), reduction=reduction)
    for shape, weighted in itertools.product([(0,), (0, 3), (4, 0)], (False, True)):
        logits = np.zeros((*shape, CLASSES), "float32")
        labels = np.zeros(shape if name in SPARSE else logits.shape, "int32")
        weights = np.ones(shape, "float32") if weighted else None
        result, gradient = run(loss, labels, logits, weights)
        assert np.array_equal(result, np.zeros(shape if reduction in (None, "none") else ()))
        assert gradient.shape == logits.shape
