"""The softmax kernels agree with the oracle: with every option, dtype, class axis and size, in every mode."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_xent.kernels import softmax_cross_entropy
from tests import oracles
from tests.backend import (
    DTYPES,
    MODES,
    TWO_MODES,
    hessian_vector_product,
    tensor,
    to_numpy,
    value_and_gradient,
)
from tests.kernels.softmax_examples import (
    IN_ONE_PROGRAM,
    OPTIONS,
    dense,
    example,
    soft_targets,
    sparse,
)
from tests.tiers import fast_for, sample, whole

SIZES = [(0, 5), (1, 1), (3, 1), (1, 2047), (5, 2048), (3, 2051), (2, 4099)]


@fast_for("all-*", "plain-*")
@pytest.mark.parametrize(
    "options, mode",
    sample(
        [(name, mode) for name in OPTIONS for mode in TWO_MODES], [(n, "eager") for n in OPTIONS] + [IN_ONE_PROGRAM]
    ),
)
def test_values_and_gradients_agree_with_the_oracle(options, mode):
    options = OPTIONS[options]
    labels, logits, upstream = example()
    targets = soft_targets(1, logits.shape)
    targets[3], targets[4] = 0.0, np.eye(7)[2]
    assert_agree_with_the_oracle(options, mode, labels, targets, logits, upstream, "float32", 2e-6)


@fast_for("all-eager")
@pytest.mark.skipif("float64" not in DTYPES, reason="JAX has no float64 unless asked")
@pytest.mark.parametrize("mode", TWO_MODES)
@pytest.mark.parametrize("options", [name if name == "all" else pytest.param(name, marks=whole) for name in OPTIONS])
def test_float64_agrees_with_the_oracle(options, mode):
    labels, logits, upstream = example()
    targets = soft_targets(1, logits.shape)
    targets[3], targets[4] = 0.0, np.eye(7)[2]
    assert_agree_with_the_oracle(OPTIONS[options], mode, labels, targets, logits, upstream, "float64", 1e-12)


def assert_agree_with_the_oracle(options, mode, labels, targets, logits, upstream, dtype, rtol):
    x = tensor(logits, dtype)
    for f, (expected, gradient) in (
        (sparse(labels, **options), oracles.sparse(labels, to_numpy(x), **options)),
        (dense(tensor(targets, dtype), **options), oracles.softmax(targets, to_numpy(x), **options)[:2]),
    ):
        value, got = value_and_gradient(f, x, upstream, mode)
        expected_gradient = upstream[:, None] * gradient
        np.testing.assert_allclose(value, expected, rtol=rtol, atol=rtol * 1e-3)
        np.testing.assert_allclose(got, expected_gradient, rtol=0, atol=rtol / 2 * np.abs(expected_gradient).max())


MANY_ROWS = [(name, 19_000, 7) for name in OPTIONS] + [("smoothing", 1100, 128), ("focal", 1100, 128)]


@fast_for("smoothing-1100-*", "weights-*")
@pytest.mark.parametrize("options, rows, classes", MANY_ROWS)
def test_many_rows_in_a_program_of_both_passes_agree_with_the_oracle(options, rows, classes):
    """Their sums and gradients have formulas of their own, `_fast_steps.py` and `sums_short_rows`."""
    options = OPTIONS[options]
    labels, logits, upstream = example(rows=rows, classes=classes)
    targets = soft_targets(1, logits.shape)
    logits[0, :2] = 40.0, 0.0  # confident
    assert_agree_with_the_oracle(options, TWO_MODES[1], labels, targets, logits, upstream, "float32", 2e-6)
    x = tensor(logits, "bfloat16")
    expected, gradient = oracles.sparse(labels, to_numpy(x), **options)
    value, got = value_and_gradient(sparse(labels, **options), x, upstream, TWO_MODES[1])
    np.testing.assert_allclose(value, expected, rtol=2e-6, atol=1e-9)
    expected = upstream[:, None] * gradient
    np.testing.assert_allclose(got, expected, rtol=2**-8 * 1.001, atol=1e-6 * np.abs(expected).max())


@fast_for("bfloat16-all-*", "float16-plain-*", "all-*-bfloat16", "plain-*-float16", "*bfloat16*all*")
@pytest.mark.parametrize(
    "options, mode",
    sample([*[(name, "eager") for name in OPTIONS], IN_ONE_PROGRAM], [("plain", "eager"), ("all", "eager")]),
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_logits_cost_one_rounding(dtype, options, mode):
    options = OPTIONS[options]
    labels, logits, upstream = example()
    x = tensor(logits, dtype)
    expected, gradient = oracles.sparse(labels, to_numpy(x), **options)
    value, got = value_and_gradient(sparse(labels, **options), x, upstream, mode)
    np.testing.assert_allclose(value, expected, rtol=2e-6, atol=1e-9)
    half_unit = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    expected = upstream[:, None] * gradient
    np.testing.assert_allclose(got, expected, rtol=half_unit * 1.001, atol=1e-6 * np.abs(expected).max())


@fast_for("shape0-1-*", "shape4-*")
@pytest.mark.parametrize("mode", [TWO_MODES[0], pytest.param(TWO_MODES[1], marks=whole)])
@pytest.mark.parametrize(
    "shape, axis", [((2, 7, 8), 1), ((7, 2, 8), 0), ((2, 7, 4, 2), -3), ((7, 16), 0), ((7,), 0), ((7,), -1)]
)
def test_any_class_axis(shape, axis, mode):
    rng = np.random.default_rng(3)
    logits, classes = rng.standard_normal(shape), shape[axis]
    outer = tuple(np.delete(shape, axis))
    labels, upstream = rng.integers(0, classes, outer), rng.uniform(0, 1, outer)
    last = np.moveaxis(logits, axis, -1).reshape(-1, classes)
    options = {"class_weight": rng.uniform(0, 2, classes), "label_smoothing": 0.3}
    expected, gradient = oracles.sparse(labels.reshape(-1), last, **options)
    gradient = np.moveaxis((upstream.reshape(-1, 1) * gradient).reshape(*outer, classes), -1, axis)
    one_hot = np.moveaxis(np.eye(classes)[labels], -1, axis)
    for f in (sparse(labels, axis=axis, **options), dense(one_hot, axis=axis, **options)):
        value, got = value_and_gradient(f, tensor(logits, "float32"), upstream, mode)
        np.testing.assert_allclose(value, expected.reshape(outer), rtol=2e-6)
        np.testing.assert_allclose(got, gradient, rtol=2e-6, atol=1e-6)


@fast_for("2-*")
@pytest.mark.parametrize(
    "rows, classes, mode",
    sample(
        [(*size, mode) for size in SIZES for mode in TWO_MODES],
        [(rows, classes, "eager") for rows, classes in SIZES if classes in (1, 5, 2048, 4099)],
    ),
)
def test_sizes_that_no_block_divides(rows, classes, mode):
    labels, logits, upstream = example(rows=rows, classes=classes)
    expected, gradient = oracles.sparse(labels, logits, label_smoothing=0.1)
    for f in (
        sparse(labels, label_smoothing=0.1),
        dense(np.eye(classes)[labels].astype("float32"), label_smoothing=0.1),
    ):
        value, got = value_and_gradient(f, tensor(logits, "float32"), upstream, mode)
        assert value.shape == (rows,) and got.shape == (rows, classes)
        np.testing.assert_allclose(value, expected, rtol=2e-6, atol=1e-12)
        np.testing.assert_allclose(got, upstream[:, None] * gradient, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options, mode",
    sample(
        [(o, mode) for o in ("plain", "smoothing and weights", "focal below 1", "all") for mode in TWO_MODES],
        [("plain", "eager"), ("all", "eager")],
    ),
)
def test_the_gradient_for_the_targets_agrees_with_the_oracle(options, mode):
    options = {k: v for k, v in OPTIONS[options].items() if k != "z_loss"}
    labels, logits, upstream = example()
    targets = soft_targets(2, logits.shape)
    expected = upstream[:, None] * oracles.softmax(targets, logits, **options)[2]
    f = lambda targets: softmax_cross_entropy(targets, tensor(logits, "float32"), **options)  # noqa: E731
    _, got = value_and_gradient(f, tensor(targets, "float32"), upstream, mode)
    np.testing.assert_allclose(got, expected, rtol=3e-6, atol=1e-6)


@fast_for("dense-plain-*")
@pytest.mark.parametrize(
    "options, mode",
    sample(
        [*[("plain", mode) for mode in MODES], ("focal below 1", "eager"), IN_ONE_PROGRAM],
        [("plain", TWO_MODES[1]), ("focal below 1", "eager")],
    ),
)
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_second_derivatives(kernel, options, mode):
    """Hessian-vector products against central differences of the oracle's gradient."""
    options = OPTIONS[options]
    labels, logits, upstream = example()
    # Logits that are equally large: all of them, as those of a new head with a kernel of zeros, and two.
    logits[0] = 0.0
    logits[1, [labels[1], labels[1] - 1]] = logits[1].max() + 0.25
    targets = soft_targets(1, logits.shape)
    vector = np.random.default_rng(5).standard_normal(logits.shape)
    dtype = "float64" if "float64" in DTYPES else "float32"
    step = 1e-6
    if kernel == "sparse":
        f, oracle = sparse(labels, **options), lambda x: oracles.sparse(labels, x, **options)[1]
    else:
        f, oracle = dense(tensor(targets, dtype), **options), lambda x: oracles.softmax(targets, x, **options)[1]
    difference = (oracle(logits + step * vector) - oracle(logits - step * vector)) / (2 * step)
    expected = upstream[:, None] * difference
    x, v, u = (tensor(t, dtype) for t in (logits, vector, upstream))
    got = hessian_vector_product(f, x, v, u, mode)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=(1e-8 if dtype == "float64" else 1e-6))


def test_the_same_input_gives_the_same_bits():
    labels, logits, _ = example(rows=64, classes=3001)
    x = tensor(logits, "float32")
    first = value_and_gradient(sparse(labels, label_smoothing=0.1), x)
    second = value_and_gradient(sparse(labels, label_smoothing=0.1), x)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


# Any shape, any options, any labels.


@st.composite
def problems(draw):
    # Few shapes and option values: each combination is compiled anew.
    rows, classes = 3, draw(st.sampled_from([1, 2, 5]))
    numbers = st.floats(-30, 30, width=32)
    logits = np.array(draw(st.lists(numbers, min_size=rows * classes, max_size=rows * classes))).reshape(rows, classes)
    labels = np.array(draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows)))
    options = {
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "focal_gamma": draw(st.sampled_from([0.0, 0.5])),
        "z_loss": draw(st.sampled_from([0.0, 0.01])),
        "logit_softcap": draw(st.sampled_from([None, 20.0])),
        "class_weight": draw(
            st.none() | st.lists(st.sampled_from([0.0, 0.5, 1.0, 4.0]), min_size=classes, max_size=classes)
        ),
    }
    return labels, logits, options


@whole
@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems())
def test_any_problem_agrees_with_the_oracle(problem):
    labels, logits, options = problem
    expected, gradient = oracles.sparse(labels, logits, **options)
    for f in (sparse(labels, **options), dense(np.eye(logits.shape[1])[labels], **options)):
        value, got = value_and_gradient(f, tensor(logits, "float32"))
        # A soft cap rounds the capped logits, by up to half a unit of the cap itself.
        atol = 4e-6 if options["logit_softcap"] else 1e-7
        np.testing.assert_allclose(value, expected, rtol=3e-6, atol=atol)
        np.testing.assert_allclose(got, gradient, rtol=0, atol=2e-6 * max(1.0, np.abs(gradient).max()))
