"""Rows that are summed in slices: the kernels against float64 NumPy."""

import numpy as np
import pytest
from keras import ops

from keras_xent.kernels import sigmoid_cross_entropy, sparse_softmax_cross_entropy
from keras_xent.kernels._compiled import CompiledKernel
from keras_xent.kernels._logarithms import finite_log
from keras_xent.kernels._xla_cpu import row_sum
from tests import oracles
from tests.backend import tensor, to_numpy, value_and_gradient

# More than 16 MB, of rows that do not fit slices of one size.
ROWS, COLUMNS = 2050, 2051


def test_the_mean_of_many_binary_labels_of_which_some_are_missing():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (ROWS, COLUMNS)).astype("float32")
    labels = rng.integers(0, 2, (ROWS, COLUMNS)).astype("float32")
    labels[rng.random((ROWS, COLUMNS)) < 0.1] = -1
    labels[1], labels[2, 5], logits[3, 7], labels[3, 7] = -1, 7.0, np.nan, 1.0
    mask = rng.random((ROWS, COLUMNS)) < 0.9
    mask[2, 5] = mask[3, 7] = True
    present = mask & (labels != -1)
    losses, slopes = oracles.sigmoid(np.where(present, labels, 0), logits.astype("float64"), pos_weight=2.0)[:2]
    count = np.maximum(present.sum(axis=1), 1)
    found, gradient = value_and_gradient(
        lambda x: sigmoid_cross_entropy(tensor(labels), x, axis=-1, mask=tensor(mask), ignore_class=-1, pos_weight=2.0),
        tensor(logits),
    )
    others = np.arange(ROWS) >= 4
    expected = np.where(present, losses, 0).sum(axis=1) / count
    slopes = np.where(present, slopes, 0) / count[:, None]
    np.testing.assert_allclose(found[others], expected[others], rtol=2e-6)
    np.testing.assert_allclose(gradient[others], slopes[others], rtol=0, atol=1e-6 * np.abs(slopes[others]).max())
    assert found[1] == 0 and not gradient[1].any()
    # A label out of range takes its whole row along, a logit that is NaN only its own gradient.
    assert np.isnan(found[2]) and np.isnan(gradient[2][present[2]]).all()
    assert np.isnan(found[3]) and np.isnan(gradient[3]).sum() == 1


@pytest.mark.parametrize("classes", [2048, 2051])
def test_many_classes_that_are_not_the_last_axis(classes):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (3, classes, 2)).astype("float32")
    labels = rng.integers(0, classes, (3, 2))
    found, gradient = value_and_gradient(
        lambda x: sparse_softmax_cross_entropy(tensor(labels), x, axis=1), tensor(logits)
    )
    log_p = np.apply_along_axis(oracles.log_softmax, 2, logits.transpose(0, 2, 1))
    np.testing.assert_allclose(found, -np.take_along_axis(log_p, labels[..., None], -1)[..., 0], rtol=2e-6)
    is_label = np.arange(classes) == labels[..., None]
    np.testing.assert_allclose(gradient.transpose(0, 2, 1), np.exp(log_p) - is_label, rtol=0, atol=1e-6)


def test_a_sum_loses_no_digits_to_equal_terms_or_to_comparisons():
    x = np.linspace(0.1, 1.0, 8, dtype="float32")[:, None] + np.zeros((8, 32_003), "float32")
    sums = CompiledKernel(lambda x: (row_sum(lambda x: x, x), row_sum(lambda x: ops.cast(x > 0.5, x.dtype), x)))
    total, count = map(to_numpy, sums(tensor(x)))
    np.testing.assert_allclose(total[:, 0], x.astype("float64").sum(axis=1), rtol=6e-7)
    assert count[:, 0].tolist() == (x > 0.5).sum(axis=1).tolist()


def test_the_logarithm_of_entropies_is_exact_and_finite():
    x = np.concatenate([np.geomspace(1.2e-38, 1, 100_000), np.linspace(0.4, 1.0, 100_000)]).astype("float32")
    log = CompiledKernel(finite_log)
    found = to_numpy(log(tensor(x[:, None])))[:, 0]
    np.testing.assert_allclose(found, np.log(x.astype("float64")), rtol=7e-8, atol=1e-7)
    zero, one = to_numpy(log(tensor(np.array([[0.0], [1.0]], "float32"))))[:, 0]
    assert zero == pytest.approx(-88, abs=1) and one == 0
