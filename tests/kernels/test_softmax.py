"""Facts of the softmax kernels."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_xent.kernels import softmax_cross_entropy, sparse_softmax_cross_entropy
from tests import facts, oracles
from tests.backend import (
    DTYPES,
    MODES,
    TWO_MODES,
    every_mode,
    tensor,
    to_numpy,
    value_and_gradient,
)
from tests.kernels.softmax_examples import (
    INF,
    NAN,
    dense,
    example,
    one_hot,
    soft_targets,
    sparse,
)
from tests.tiers import fast_for, sample


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


@fast_for("sparse-xla", "sparse-jit")
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


@fast_for("bfloat16*")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_labels_are_not_rounded_to_the_dtype_of_16_bit_logits(dtype):
    labels, logits, loss, _ = facts.edge_labels()
    np.testing.assert_allclose(to_numpy(sparse_softmax_cross_entropy(labels, tensor(logits, dtype))), loss, rtol=1e-6)


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


def test_the_small_loss_of_another_class_than_the_label_is_kept():
    # With smoothing 0.5 and label weight 0, only a quarter of 3 log(1 + exp(-44)) is left.
    logits = np.array([[44.0, 0.0]], "float32")
    loss = sparse_softmax_cross_entropy(np.array([1]), tensor(logits), label_smoothing=0.5, class_weight=[3.0, 0.0])
    np.testing.assert_allclose(to_numpy(loss), [0.75 * np.log1p(np.exp(-44.0))], rtol=1e-6)


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


def test_variables_and_lists_are_read():
    labels, logits, _ = example()
    expected, _ = oracles.sparse(labels, logits)
    variable = keras.Variable(logits.astype("float32"))
    np.testing.assert_allclose(to_numpy(sparse_softmax_cross_entropy(labels.tolist(), variable)), expected, rtol=2e-6)
    assert ops.shape(sparse_softmax_cross_entropy([0], [[1.0, 2.0]])) == (1,)


@fast_for("*-128")
@pytest.mark.parametrize("classes", [16, 128])
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_compiled_steps_of_larger_batches_have_the_same_edge_rows(kernel, classes):
    """Confident and infinite rows among many others: what is not tiny has formulas of its own, `_fast_steps.py`."""
    rng, rows = np.random.default_rng(0), (2**17 if (kernel, classes) == ("dense", 16) else 8192) // classes + 8
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
    np.testing.assert_allclose(gradient[finite], expected, rtol=2e-6, atol=1e-6 * np.abs(expected).max())
    # Exact where the probability of the label has rounded to 1.
    np.testing.assert_allclose(gradient[0], expected[0], rtol=5e-6)
    np.testing.assert_array_equal(value[[3, 4, 5]], [0.0, 0.0, INF])
    np.testing.assert_array_equal(gradient[[3, 4]], 0.0)
    assert np.isnan(value[[6, 7]]).all() and np.isnan(gradient[[6, 7]]).any(axis=1).all()
