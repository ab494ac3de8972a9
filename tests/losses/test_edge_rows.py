"""Every loss meets every edge row, in every mode, as a training step computes it: one program for all rows."""

import math

import numpy as np
import pytest

from tests import facts
from tests.backend import MODES, every_mode, tensor, to_numpy
from tests.losses.cases import ARGUMENTS, NAMES, SOFTMAX, make
from tests.losses.running import assert_close, run
from tests.tiers import fast_for, sample

every_loss = pytest.mark.parametrize("name", NAMES)
DTYPES_OF_LABELS = (
    ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64")
)  # fmt: skip


def rows_of(name):
    return facts.SIGMOID if name == "BinaryCrossentropy" else facts.SOFTMAX


def labels_of(name):
    """The labels of the rows as the loss takes them: `[16, 1]`, one-hot, or integers."""
    rows = rows_of(name)
    if name == "BinaryCrossentropy":
        return rows.labels[:, None]
    return np.eye(facts.CLASSES, dtype="float32")[rows.labels] if name == "CategoricalCrossentropy" else rows.labels


@fast_for("*-xla", "*-jit")
@pytest.mark.parametrize("mode", MODES)
@every_loss
def test_edge_rows_have_their_losses_and_gradients(name, mode):
    """Infinite, huge and NaN logits; rows that are right or wrong with certainty."""
    rows = rows_of(name)
    facts.assert_are(rows, *run(make(name, from_logits=True, reduction=None), labels_of(name), rows.logits, mode=mode))


@fast_for("*-Binary*", "*-Masked*-ignore_class", "*-Categorical*-mask")
@pytest.mark.parametrize(
    "name, how",
    [
        (name, how)
        for name in NAMES
        for how in ("mask", "sample_weight", "ignore_class")
        if how != "ignore_class" or how in ARGUMENTS[name]
    ],
)
@every_mode
def test_rows_that_do_not_count_leave_no_trace(name, how, mode):
    """What is infinite, huge or NaN lies under a mask, a weight of 0 or an ignored label."""
    rows, labels, arrays, options = rows_of(name), labels_of(name), {}, {}
    if how == "ignore_class":
        labels, options = np.where(rows.counts[:, None] if labels.ndim == 2 else rows.counts, labels, -1), {how: -1}
    else:
        arrays = {how: rows.counts.astype("bool" if how == "mask" else "float32")}
    loss, gradient = run(
        make(name, from_logits=True, reduction="token_mean", **options), labels, rows.logits, **arrays, mode=mode
    )
    number = rows.counts.sum()
    assert_close(loss, rows.losses[rows.counts].mean())
    assert_close(gradient, np.where(rows.counts[:, None], rows.gradients, 0) / number, scale=1e-6)
    assert not gradient[~rows.counts].any()


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode in ("xla", "jit")])
@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_an_out_of_range_label_is_nan_in_loss_and_gradient_inside_xla(dtype, mode):
    """Inside XLA a row whose label is not a class is NaN, and the other rows are as without it."""
    labels = np.array([0, 7, 2, -1, 6, 100, -100, 1.5, 3])[: 9 if dtype == "float32" else 7].astype(dtype)
    logits = np.tile(np.arange(7, dtype="float32"), (len(labels), 1))
    found, gradient = run(
        make("SparseCategoricalCrossentropy", from_logits=True, reduction=None), labels, logits, mode=mode
    )
    bad = ~np.isin(labels, range(7))
    good = np.log(np.exp(np.arange(7.0)).sum()) - labels[~bad]
    assert_close(found[~bad], good)
    assert np.isnan(found[bad]).all()
    assert np.isnan(gradient[bad]).all()
    assert np.isfinite(gradient[~bad]).all()


# Labels are integers.


@fast_for("bfloat16-eager")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", sample(["float32", "bfloat16", "float16"], ["bfloat16"]))
def test_labels_are_never_rounded_to_the_dtype_of_the_loss(dtype, mode):
    labels, logits, expected, slope = facts.edge_labels()
    loss = make("SparseCategoricalCrossentropy", from_logits=True, dtype=dtype, reduction="sum")
    result, gradient = run(loss, labels, logits, mode=mode)
    # The result is rounded once.
    assert_close(result, 16 * expected, rtol={"bfloat16": 2**-8, "float16": 2**-11}.get(dtype, 2e-6))
    assert_close(gradient[np.arange(16), labels], np.full(16, slope))


@pytest.mark.parametrize("dtype", sample(["float32", "bfloat16", "float16"], ["bfloat16"]))
def test_labels_past_two_to_the_24_are_never_rounded_to_float32(dtype):
    label = 2**24 + 1
    logits = np.full((1, label + 2), -1e4, "float32")
    logits[0, [label, 0]] = 1.0, 0.0
    loss = make("SparseCategoricalCrossentropy", from_logits=True, dtype=dtype)
    result, gradient = run(loss, np.array([label]), logits)
    assert_close(result, to_numpy(tensor(np.float32(math.log1p(math.exp(-1))), dtype)))
    assert_close(gradient[0, [label, 0]], np.array([-1, 1]) / (1 + math.e))


@pytest.mark.parametrize(
    "dtype, mode",
    sample(
        [(dtype, mode) for dtype in DTYPES_OF_LABELS for mode in MODES],
        [
            *[(dtype, "eager") for dtype in DTYPES_OF_LABELS],
            *[(dtype, list(MODES)[-1]) for dtype in ("int8", "uint16", "int64", "float16")],
        ],
    ),
)
def test_labels_of_any_dtype(dtype, mode):
    rows = facts.SOFTMAX
    labels, logits = rows.labels[rows.counts], rows.logits[rows.counts]
    loss = make("SparseCategoricalCrossentropy", from_logits=True, reduction=None)
    result, gradient = run(loss, labels.astype(dtype), logits, mode=mode)
    assert_close(result, rows.losses[rows.counts])
    assert_close(gradient, rows.gradients[rows.counts], scale=1e-6)


@fast_for("*-bfloat16-*")
@pytest.mark.parametrize("dtype, rtol", [("bfloat16", 2**-8), ("float16", 2**-6)])
@pytest.mark.parametrize("name", [name for name in SOFTMAX if name != "MaskedSequenceCrossentropy"])
@every_mode
def test_confident_16_bit_rows_keep_their_gradient(name, dtype, rtol, mode):
    """p = 1 - 1.2e-5 of the label: the gradient is not 1 - 1, which is 0 in bfloat16, but what the others have."""
    x = tensor(np.array([[12.0, 0.0, 0.0]], "float32"), dtype)
    y = np.array([0]) if name == "SparseCategoricalCrossentropy" else np.array([[1, 0, 0]])
    result, gradient = run(make(name, from_logits=True), y, x, mode=mode)
    odds = math.exp(-12)
    assert_close(result, math.log1p(2 * odds))
    assert_close(gradient, np.array([[-2 * odds, odds, odds]]) / (1 + 2 * odds), rtol=rtol)
