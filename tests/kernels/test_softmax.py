"""Facts of the softmax kernels, then agreement with the oracle, then modes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_xent.kernels import softmax_cross_entropy, sparse_softmax_cross_entropy
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
from tests.tiers import fast_for, sample, whole

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"class_weight": [0.5, 2.0, 0.0, 1.5, 1.0, 3.0, 0.25]},
    "smoothing and weights": {"label_smoothing": 0.3, "class_weight": [0.5, 2.0, 0.0, 1.5, 1.0, 3.0, 0.25]},
    "focal": {"focal_gamma": 2.0},
    "focal below 1": {"focal_gamma": 0.5},
    "focal and smoothing": {"focal_gamma": 1.5, "label_smoothing": 0.2},
    "z-loss": {"z_loss": 0.1},
    "softcap": {"logit_softcap": 3.0},
    "all": {
        "label_smoothing": 0.1,
        "class_weight": [0.5, 2.0, 0.5, 1.5, 1.0, 3.0, 0.25],
        "focal_gamma": 1.5,
        "z_loss": 0.01,
        "logit_softcap": 5.0,
    },
}
INF, NAN = float("inf"), float("nan")
IN_ONE_PROGRAM = ("all", TWO_MODES[1])


def example(seed=0, rows=16, classes=7, scale=2.0):
    rng = np.random.default_rng(seed)
    logits = scale * rng.standard_normal((rows, classes))
    labels = rng.integers(0, classes, rows)
    upstream = rng.uniform(-1, 2, rows)
    return labels, logits, upstream


def sparse(labels, **options):
    return lambda logits: sparse_softmax_cross_entropy(labels, logits, **options)


def dense(targets, **options):
    return lambda logits: softmax_cross_entropy(targets, logits, **options)


def one_hot(labels, classes=facts.CLASSES):
    return np.eye(classes, dtype="float32")[labels]


def soft_targets(seed, shape):
    targets = np.random.default_rng(seed).dirichlet(np.full(shape[-1], 0.3), shape[:-1])
    return targets.reshape(shape)


# Facts.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_edge_rows_have_their_losses_and_gradients(kernel, mode):
    """Known probabilities; huge, infinite and NaN logits; right or wrong with certainty."""
    rows = facts.SOFTMAX
    f = sparse(rows.labels) if kernel == "sparse" else dense(one_hot(rows.labels))
    facts.assert_are(rows, *value_and_gradient(f, tensor(rows.logits), mode=mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_masked_rows_leave_no_trace(kernel, mode):
    rows, upstream = facts.SOFTMAX, np.random.default_rng(0).uniform(-1, 2, 16)
    labels = np.where(rows.counts, rows.labels, -1)
    # Half of the rows that do not count are masked, the others ignored.
    mask = rows.counts | (np.arange(16) % 2 == 0)
    f = sparse(labels, mask=mask, ignore_class=-1)
    if kernel == "dense":
        f = dense(one_hot(rows.labels), mask=mask & (labels >= 0))
    value, gradient = value_and_gradient(f, tensor(rows.logits), upstream, mode)
    expected = upstream[:, None] * rows.gradients
    np.testing.assert_allclose(value, np.where(rows.counts, rows.losses, 0), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.where(rows.counts[:, None], expected, 0), rtol=1e-6)


@every_mode
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_nan_stays_in_its_row(kernel, mode):
    """Rows that are long enough to be summed in parts."""
    logits = np.random.default_rng(0).standard_normal((7, 2500)).astype("float32")
    clean, clean_rows = logits.copy(), [0, 2, 4, 6]
    logits[1, 0] = logits[3, 1] = logits[5, 2499] = NAN
    logits[3, 0] = INF
    labels = np.ones(7, int)
    f = sparse(labels) if kernel == "sparse" else dense(np.eye(2500, dtype="float32")[labels])
    value, gradient = value_and_gradient(f, tensor(logits), mode=mode)
    expected, expected_gradient = value_and_gradient(f, tensor(clean), mode=mode)
    assert np.isnan(value[1::2]).all() and np.isnan(gradient[1::2]).any(axis=1).all()
    np.testing.assert_array_equal(value[clean_rows], expected[clean_rows])
    np.testing.assert_array_equal(gradient[clean_rows], expected_gradient[clean_rows])


@every_mode
def test_masked_nan_or_infinite_targets_have_no_gradient(mode):
    targets = np.eye(7, dtype="float32")
    targets[1:4, 2] = NAN, INF, -INF
    mask = np.isfinite(targets).all(axis=1)
    logits = np.random.default_rng(0).normal(size=(7, 7)).astype("float32")
    value, gradient = value_and_gradient(
        lambda x: softmax_cross_entropy(tensor(targets), x, mask=tensor(mask)), tensor(logits), mode=mode
    )
    assert np.all(value[~mask] == 0) and np.all(gradient[~mask] == 0)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(gradient[mask], (probabilities - targets)[mask], atol=1e-6)


def test_uniform_logits_cost_log_num_classes():
    for classes in (1, 2, 50_257):
        loss = sparse_softmax_cross_entropy(np.array([classes - 1]), np.zeros((1, classes), "float32"))
        np.testing.assert_allclose(to_numpy(loss), np.log(classes), rtol=2e-6)


@pytest.mark.parametrize("classes", [7, 1000])
def test_the_gradient_of_a_flat_distribution_is_rounded_as_its_probabilities(classes):
    # All logits are the largest, of probability 1 / C: a difference from 1 would be C times less accurate.
    targets = np.full((1, classes), 1 / classes, "float32")
    logits = tensor(np.zeros((1, classes), "float32"))
    for f in (dense(targets), sparse(np.array([0]), label_smoothing=1.0)):
        _, gradient = value_and_gradient(f, logits)
        assert np.abs(gradient).max() <= 2e-6 / classes


def test_smoothed_losses_whose_sum_overflows():
    logits = np.zeros((1, 2000), "float32")
    logits[:, :20] = -3e38
    right = 0.1 / 2000 * 20 * 3e38
    for loss in (
        sparse_softmax_cross_entropy(np.array([50]), logits, label_smoothing=0.1),
        softmax_cross_entropy(np.eye(2000, dtype="float32")[[50]], logits, label_smoothing=0.1),
    ):
        np.testing.assert_allclose(to_numpy(loss), right, rtol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_labels_are_not_rounded_to_the_dtype_of_16_bit_logits(dtype):
    labels, logits, loss, _ = facts.edge_labels()
    np.testing.assert_allclose(to_numpy(sparse_softmax_cross_entropy(labels, tensor(logits, dtype))), loss, rtol=1e-5)


def test_confident_rows_keep_their_small_losses_and_gradients():
    # The probability of the others is e^-20: 1 - p rounds to 0 in float32.
    logits = np.array([[20.0, 0.0, -1.0], [-15.0, 0.0, -16.0]])
    labels = np.array([0, 1])
    for dtype in DTYPES:
        expected, expected_gradient = oracles.sparse(labels, logits)
        unit = {"float64": 1e-15, "float32": 1e-7, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
        for f in (sparse(labels), dense(np.eye(3)[labels])):
            value, gradient = value_and_gradient(f, tensor(logits, dtype))
            np.testing.assert_allclose(value, expected, rtol=max(8 * 2e-16, 3e-7 if dtype != "float64" else 1e-14))
            # A float16 gradient below its smallest number is 0.
            atol = 6e-8 if dtype == "float16" else 0
            np.testing.assert_allclose(gradient, expected_gradient, rtol=4 * unit, atol=atol)


@fast_for("20.0-2")
@pytest.mark.parametrize(
    "softcap, classes",
    sample([(cap, classes) for cap in (20.0, 30.0, 50.0) for classes in (2, 300, 4096)], [(20.0, 2), (50.0, 4096)]),
)
def test_a_saturated_softcap_is_exact(softcap, classes):
    """The loss to the rounding of the capped logits, never negative; the gradient to that of the cap's slope."""
    logits = np.zeros((64, classes))
    logits[:, 0] = np.linspace(20, 60, 64)
    logits = logits.astype("float32")
    capped = softcap * np.tanh(logits[:, 0].astype("float64") / softcap)
    expected = np.log1p((classes - 1) * np.exp(-capped))
    slope = -np.expm1(-expected) / np.cosh(logits[:, 0].astype("float64") / softcap) ** 2
    for f in (
        sparse(np.zeros(64, int), logit_softcap=softcap),
        dense(np.eye(1, classes).repeat(64, 0).astype("float32"), logit_softcap=softcap),
    ):
        value, gradient = value_and_gradient(f, tensor(logits))
        np.testing.assert_allclose(value, expected, rtol=softcap * 2**-22)
        np.testing.assert_allclose(gradient[:, 0], -slope, rtol=softcap * 2**-22)


def test_targets_need_not_sum_to_one():
    row = np.array([0.1, 2.1, 1.1, 0.1, 0.1, 0.1, 0.1])
    logits, p = tensor([row] * 16, "float32"), np.exp(row) / np.exp(row).sum()
    targets = np.zeros((16, 7), "float32")
    targets[1, 0], targets[2, :3] = 2, [3, 1, 0.5]
    value, gradient = value_and_gradient(dense(targets), logits)
    np.testing.assert_allclose(value, -(targets * np.log(p)).sum(-1), rtol=2e-6)
    np.testing.assert_allclose(gradient, targets.sum(-1, keepdims=True) * p - targets, rtol=2e-6, atol=2e-7)
    value, gradient = value_and_gradient(dense(targets, label_smoothing=0.2), logits)
    assert value[0] == 0 and (gradient[0] == 0).all()


def test_targets_of_any_size_are_exact():
    labels, logits, _ = example()
    targets = soft_targets(1, (16, 7)) * np.tile([1e-3, 1.0, 1e3, 1e6], 4)[:, None]
    expected, expected_gradient, _ = oracles.softmax(targets, logits)
    value, gradient = value_and_gradient(dense(tensor(targets, "float32")), tensor(logits, "float32"))
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    scale = np.abs(expected_gradient).max(axis=1, keepdims=True)
    np.testing.assert_allclose(gradient / scale, expected_gradient / scale, atol=2e-6)


def test_ignored_labels_of_unsigned_dtypes_do_not_wrap_around():
    loss = sparse_softmax_cross_entropy(np.array([255, 0], "uint8"), np.zeros((2, 256), "float32"), ignore_class=-1)
    np.testing.assert_allclose(to_numpy(loss), [np.log(256)] * 2, rtol=1e-6)
    loss = sparse_softmax_cross_entropy(np.array([255, 0], "uint8"), np.zeros((2, 3), "float32"), ignore_class=255)
    np.testing.assert_allclose(to_numpy(loss), [0, np.log(3)], rtol=1e-6)


# Labels that are out of range.


@pytest.mark.parametrize("label", [7, -1, 2**31 - 1])
def test_an_out_of_range_label_is_an_error_in_eager_mode(label):
    _, logits, _ = example()
    with pytest.raises(ValueError) as error:
        sparse_softmax_cross_entropy(np.array([0, 1, label, *[3] * 13]), tensor(logits, "float32"))
    assert str(error.value) == (
        "`labels` must be classes from 0 to 6, since `logits` has 7. "
        f"Received: label {label} at position (2,), and 1 such label(s) in all. If it marks padding, say so with "
        f"`ignore_class={label}`."
    )


def test_float_labels_must_be_whole():
    _, logits, _ = example()
    with pytest.raises(ValueError) as error:
        sparse_softmax_cross_entropy(np.array([1.0, 1.5, *[2.0] * 14]), tensor(logits, "float32"))
    assert str(error.value) == (
        "`labels` must be whole numbers, the index of one class each. Received: label 1.5 at position (1,), and 1 such "
        "label(s) in all. For soft targets use the categorical loss."
    )


def test_mismatched_shapes_are_refused_with_both_shapes():
    with pytest.raises(ValueError) as error:
        sparse_softmax_cross_entropy(np.zeros((2, 3), int), np.zeros((2, 4, 5), "float32"))
    assert str(error.value) == (
        "`labels` must have the shape of `logits` without its class axis, one integer for each distribution. Received: "
        "labels of shape (2, 3) and logits of shape (2, 4, 5) with class axis 2, so labels of shape (2, 4) are needed."
    )
    with pytest.raises(ValueError) as error:
        softmax_cross_entropy(np.zeros((2, 4)), np.zeros((2, 5), "float32"))
    assert str(error.value) == (
        "`targets` and `logits` must have the same shape. Received: targets of shape (2, 4) and logits of shape "
        "(2, 5). For integer labels use the sparse loss."
    )
    with pytest.raises(ValueError) as error:
        softmax_cross_entropy(np.zeros((2, 4)), np.zeros((2, 4), "float32"), axis=2)
    assert str(error.value) == ("`axis` must be an integer from -2 to 1 for logits of 2 dimensions. Received: axis=2.")
    with pytest.raises(ValueError) as error:
        sparse_softmax_cross_entropy(np.zeros(2, int), np.zeros((2, 4), "float32"), class_weight=[1.0, 2.0])
    assert str(error.value) == (
        "`class_weight` must hold one weight for each of the 4 classes of `logits`. "
        "Received: class_weight of shape (2,)."
    )


# Agreement with the oracle.

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


@fast_for("0-5-*", "1-1-*", "2-4099-*")
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


@fast_for("*-plain-*")
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
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=(1e-7 if dtype == "float64" else 2e-5))


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


def test_variables_and_lists_are_read():
    import keras

    labels, logits, _ = example()
    expected, _ = oracles.sparse(labels, logits)
    variable = keras.Variable(logits.astype("float32"))
    np.testing.assert_allclose(to_numpy(sparse_softmax_cross_entropy(labels.tolist(), variable)), expected, rtol=2e-6)
    assert ops.shape(sparse_softmax_cross_entropy([0], [[1.0, 2.0]])) == (1,)


@pytest.mark.parametrize("classes", [16, 128])
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_compiled_steps_of_larger_batches_have_the_same_edge_rows(kernel, classes):
    """Confident and infinite rows among many others: JAX has formulas of its own for what is not tiny."""
    rng, rows = np.random.default_rng(0), 8192 // classes + 8
    logits = rng.standard_normal((rows, classes)).astype("float32")
    labels = rng.integers(0, classes, rows)
    labels[:8] = 0
    logits[0, 0] = logits[1, 1] = 40.0  # right and wrong with certainty
    logits[2, :2] = 20.0, 20.0  # two are largest
    logits[3, 1:] = -INF
    logits[4, 0] = logits[5, 1] = logits[6, 1] = logits[6, 2] = INF
    logits[7, 2] = NAN
    f = sparse(labels) if kernel == "sparse" else dense(np.eye(classes, dtype="float32")[labels])
    value, gradient = value_and_gradient(f, tensor(logits), mode=TWO_MODES[1])
    finite = np.setdiff1d(np.arange(rows), [3, 4, 5, 6, 7])
    x, one_hot = logits[finite].astype("float64"), np.eye(classes)[labels[finite]]
    others = np.exp(x - x[one_hot == 1][:, None]) * (1 - one_hot)  # over the label's own
    total = others.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(value[finite], np.log1p(total[:, 0]), rtol=2e-6)
    expected = (others - total * one_hot) / (1 + total)
    np.testing.assert_allclose(gradient[finite], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    # Exact where the probability of the label has rounded to 1.
    np.testing.assert_allclose(gradient[0], expected[0], rtol=2e-5)
    np.testing.assert_array_equal(value[[3, 4, 5]], [0.0, 0.0, INF])
    np.testing.assert_array_equal(gradient[[3, 4]], 0.0)
    assert np.isnan(value[[6, 7]]).all() and np.isnan(gradient[[6, 7]]).any(axis=1).all()
