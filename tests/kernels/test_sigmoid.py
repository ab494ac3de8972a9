"""Facts of the sigmoid kernel, then agreement with the oracle, then modes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_xent.kernels import sigmoid_cross_entropy
from tests import facts, oracles
from tests.backend import (
    DTYPES,
    MODES,
    TWO_MODES,
    every_mode,
    hessian_vector_product,
    tensor,
    to_numpy,
    value_and_gradient,
)
from tests.tiers import fast_for, sample

INF, NAN = float("inf"), float("nan")
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "positive weight": {"pos_weight": 3.0},
    "positive weights": {"pos_weight": [0.5, 1.0, 0.0, 4.0, 2.0]},
    "focal": {"focal_gamma": 2.0, "focal_alpha": 0.25},
    "focal below 1": {"focal_gamma": 0.5},
    "balanced": {"focal_alpha": 0.75},
    "all": {"label_smoothing": 0.1, "pos_weight": 3.0, "focal_gamma": 1.5, "focal_alpha": 0.3},
}


def example(shape=(6, 5), scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    logits = scale * rng.standard_normal(shape)
    labels = rng.integers(0, 2, shape).astype(float)
    labels.flat[::4] = rng.uniform(size=labels.flat[::4].shape)
    return labels, logits, rng.uniform(-1, 2, shape)


def kernel(labels, **options):
    return lambda logits: sigmoid_cross_entropy(labels, logits, **options)


# Facts.


@pytest.mark.parametrize("mode", MODES)
def test_edge_labels_have_their_losses_and_gradients(mode):
    """Known probabilities; huge, infinite and NaN logits; right or wrong with certainty."""
    rows = facts.SIGMOID
    losses, gradients = value_and_gradient(kernel(rows.labels[:, None]), tensor(rows.logits), mode=mode)
    facts.assert_are(rows, losses[:, 0], gradients)


@every_mode
@pytest.mark.parametrize("options", ["positive weight", "focal", "focal below 1"])
def test_options_have_their_limits_at_infinite_logits(options, mode):
    options = OPTIONS[options]
    logits = tensor([INF, -INF, INF, -INF], "float32")
    value, gradient = value_and_gradient(kernel(np.array([1, 0, 0, 1]), **options), logits, mode=mode)
    negative = 0.75 if "focal_alpha" in options else 1.0
    positive = 0.25 if "focal_alpha" in options else options.get("pos_weight", 1.0)
    np.testing.assert_array_equal(value, [0, 0, INF, INF])
    np.testing.assert_allclose(gradient, [0, 0, negative, -positive], rtol=1e-6)


@every_mode
def test_missing_labels_leave_no_trace(mode):
    labels, logits, upstream = example()
    labels[0, 1], labels[3] = NAN, NAN
    logits[0, 1] = NAN
    there = ~np.isnan(labels)
    expected, slope, _ = oracles.sigmoid(np.where(there, labels, 0), np.where(there, logits, 0))
    expected, slope = np.where(there, expected, 0), np.where(there, slope, 0)
    value, gradient = value_and_gradient(
        kernel(tensor(labels, "float32"), ignore_class=NAN), tensor(logits, "float32"), upstream, mode
    )
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    np.testing.assert_allclose(gradient, upstream * slope, rtol=2e-6, atol=1e-6)
    # The mean over the labels that are there; an example without any has loss 0 and gradient 0.
    count = np.maximum(there.sum(1), 1)
    for f in (
        kernel(tensor(labels, "float32"), ignore_class=NAN, axis=-1),
        kernel(np.where(there, labels, -1), ignore_class=-1, axis=-1),
        kernel(np.where(there, labels, 0), mask=there, axis=-1),
    ):
        value, gradient = value_and_gradient(f, tensor(logits, "float32"), upstream[:, 0], mode)
        np.testing.assert_allclose(value, expected.sum(1) / count, rtol=2e-6)
        np.testing.assert_allclose(gradient, (upstream[:, 0] / count)[:, None] * slope, rtol=2e-6, atol=1e-6)


def test_nan_stays_in_its_label():
    labels, logits, _ = example((3, 2500))
    logits[1, 7] = NAN
    value, gradient = value_and_gradient(kernel(labels), tensor(logits, "float32"))
    np.testing.assert_array_equal(np.isnan(value), np.isnan(logits))
    np.testing.assert_array_equal(np.isnan(gradient), np.isnan(logits))
    value = to_numpy(sigmoid_cross_entropy(labels, tensor(logits, "float32"), axis=-1))
    np.testing.assert_array_equal(np.isnan(value), [False, True, False])


def test_mismatched_shapes_are_refused_with_both_shapes():
    with pytest.raises(ValueError) as error:
        sigmoid_cross_entropy(np.zeros(3), np.zeros((3, 1), "float32"))
    assert str(error.value) == (
        "`labels` and `logits` must have the same shape. Received: labels of shape (3,) and logits of shape (3, 1)."
    )
    # Of a mask that is broadcast, each entry would count as one label.
    with pytest.raises(ValueError, match="`mask` and `logits` must have the same shape"):
        sigmoid_cross_entropy(np.zeros((3, 4)), np.zeros((3, 4), "float32"), axis=-1, mask=np.ones((3, 1), bool))
    with pytest.raises(ValueError) as error:
        sigmoid_cross_entropy(np.zeros((3, 4)), np.zeros((3, 4), "float32"), pos_weight=[1.0, 2.0])
    assert str(error.value) == (
        "`pos_weight` must be one number, or one for each of the 4 labels of an example. "
        "Received: pos_weight of shape (2,)."
    )


# Agreement with the oracle.

SHAPES = [((2, 5, 3), 1), ((5, 2), 0), ((5,), 0), ((0, 5), -1), ((3, 2051), -1), ((2, 4099), 1)]


@fast_for("float32-*-all-*", "float32-*-plain-*")
@pytest.mark.parametrize(
    "options, mode",
    sample(
        [(name, mode) for name in OPTIONS for mode in TWO_MODES],
        [*[(name, "eager") for name in OPTIONS], ("all", TWO_MODES[1])],
    ),
)
@pytest.mark.parametrize("dtype, rtol", sample([("float32", 2e-6), ("float64", 1e-12)], [("float32", 2e-6)]))
def test_values_and_gradients_agree_with_the_oracle(dtype, rtol, options, mode):
    options = OPTIONS[options]
    labels, logits, upstream = example()
    if dtype in DTYPES:
        x, y = tensor(logits, dtype), tensor(labels, dtype)
        expected, slope, for_labels = oracles.sigmoid(to_numpy(y), to_numpy(x), **options)
        value, gradient = value_and_gradient(kernel(y, **options), x, upstream, mode)
        np.testing.assert_allclose(value, expected, rtol=rtol)
        np.testing.assert_allclose(gradient, upstream * slope, rtol=rtol, atol=rtol / 2 * np.abs(slope).max())
        value, gradient = value_and_gradient(lambda y: sigmoid_cross_entropy(y, x, **options), y, upstream, mode)
        np.testing.assert_allclose(gradient, upstream * for_labels, rtol=2 * rtol, atol=rtol * np.abs(for_labels).max())
        value, gradient = value_and_gradient(kernel(y, axis=-1, **options), x, upstream[:, 0], mode)
        np.testing.assert_allclose(value, expected.mean(1), rtol=rtol)
        np.testing.assert_allclose(
            gradient, upstream[:, :1] * slope / 5, rtol=rtol, atol=rtol / 2 * np.abs(slope).max()
        )


@fast_for("all-bfloat16", "plain-float16")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", ["plain", "all"])
def test_16_bit_logits_cost_one_rounding(dtype, options):
    options = OPTIONS[options]
    labels, logits, upstream = example()
    x = tensor(logits, dtype)
    expected, slope, _ = oracles.sigmoid(labels, to_numpy(x), **options)
    value, gradient = value_and_gradient(kernel(labels, **options), x, upstream)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    half_unit = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    np.testing.assert_allclose(gradient, upstream * slope, rtol=half_unit * 1.001, atol=1e-6)


@fast_for("shape0-*", "shape4-*")
@pytest.mark.parametrize(
    "shape, axis, mode",
    sample(
        [(*shape, mode) for shape in SHAPES for mode in TWO_MODES],
        [(*SHAPES[i], mode) for mode, chosen in zip(TWO_MODES, [(0, 1, 3, 5), (2, 4)], strict=True) for i in chosen],
    ),
)
def test_any_axis_and_size(shape, axis, mode):
    labels, logits, _ = example(shape)
    outer = tuple(np.delete(shape, axis))
    upstream = np.random.default_rng(1).uniform(0, 1, outer)
    expected, slope, _ = oracles.sigmoid(labels, logits)
    value, gradient = value_and_gradient(kernel(labels, axis=axis), tensor(logits, "float32"), upstream, mode)
    np.testing.assert_allclose(value, expected.mean(axis), rtol=2e-6)
    np.testing.assert_allclose(gradient * shape[axis], np.expand_dims(upstream, axis) * slope, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("options", sample(["plain", "focal below 1", "all"], ["all"]))
def test_second_derivatives(options):
    options = OPTIONS[options]
    labels, logits, upstream = example()
    vector = np.random.default_rng(5).standard_normal(logits.shape)
    dtype = "float64" if "float64" in DTYPES else "float32"
    step = 1e-6
    slope = lambda x: oracles.sigmoid(labels, x, **options)[1]  # noqa: E731
    expected = upstream * (slope(logits + step * vector) - slope(logits - step * vector)) / (2 * step)
    x, v, u = (tensor(t, dtype) for t in (logits, vector, upstream))
    got = hessian_vector_product(kernel(labels, **options), x, v, u)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8 if dtype == "float64" else 1e-6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, 0.25]), st.floats(-200, 200, width=32)), min_size=6, max_size=6))
@pytest.mark.whole
def test_any_problem_agrees_with_the_oracle(problem):
    labels, logits = np.array(problem).T
    for options in (OPTIONS["plain"], OPTIONS["all"]):
        expected, slope, _ = oracles.sigmoid(labels, logits, **options)
        value, gradient = value_and_gradient(kernel(labels, **options), tensor(logits, "float32"))
        # Below the smallest normal float32 number a processor may give 0.
        np.testing.assert_allclose(value, expected, rtol=3e-6, atol=1.2e-38)
        np.testing.assert_allclose(gradient, slope, rtol=3e-6, atol=2e-7 * np.abs(slope).max() + 1.2e-38)
