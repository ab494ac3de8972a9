"""Weights of 0, sizes that become known late, and what a row of targets counts."""

import numpy as np
import pytest

import keras_xent as kx
from tests.backend import BACKEND, every_mode, tensor, to_numpy, value_and_gradient
from tests.losses.cases import CLASSES, NAMES, arguments, example, make
from tests.losses.running import assert_close
from tests.tiers import fast_for, sample

every_loss = pytest.mark.parametrize("name", NAMES)
NAN, INF = float("nan"), float("inf")


def _gradient_for_weights(loss, labels, logits, weights, mode):
    return value_and_gradient(lambda weights: loss(labels, logits, weights), tensor(weights), mode=mode)[1]


@fast_for("Binary*", "Masked*")
@every_mode
@every_loss
def test_the_derivative_for_a_weight_is_the_loss_even_at_weight_0(name, mode):
    labels, logits = example(name, (4,), missing=False)
    losses = to_numpy(make(name, **arguments(name), reduction=None)(labels, logits))
    loss = make(name, **arguments(name), reduction="sum")
    weights = np.array([0.0, 1.0, 0.0, 2.0], "float32")
    assert_close(_gradient_for_weights(loss, labels, logits, weights, mode), losses)
    # What has no finite loss has no derivative.
    logits[0], labels[2] = NAN, 99 if name in ("SparseCategoricalCrossentropy", "MaskedSequenceCrossentropy") else 1
    gradient = _gradient_for_weights(loss, labels, logits, weights, mode)
    assert gradient[0] == 0 and np.isfinite(gradient).all()


@fast_for("MaskedSequenceCrossentropy-*")
@pytest.mark.skipif(BACKEND != "tensorflow", reason="shapes are always known to JAX")
@pytest.mark.parametrize("shape", sample([(1, 3), (1, 1), (3, 3), (4, 2)], [(1, 3)], one_argument=True))
@every_loss
def test_weights_whose_shape_proves_wrong_when_it_is_seen_are_refused(name, shape):
    import tensorflow as tf

    labels, logits = example(name)
    unknown = [tf.TensorSpec((None,) * labels.ndim, labels.dtype), tf.TensorSpec((None, None, CLASSES), "float32")]
    loss = make(name, **arguments(name))
    function = tf.function(
        lambda *inputs: loss(*inputs), input_signature=[*unknown, tf.TensorSpec((None, None))], autograph=False
    )
    assert_close(function(labels, logits, tf.ones((4, 1))), float(loss(labels, logits)))
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        function(labels, logits, tf.ones(shape))
    if shape[0] == 1:
        assert "`sample_weight` must line up from the left with the losses: [batch], [batch, 1]" in str(error.value)


@fast_for("Masked*", "Binary*")
@pytest.mark.skipif(BACKEND != "tensorflow", reason="shapes are always known to JAX")
@every_loss
def test_one_label_for_several_predictions_is_refused_when_its_shape_is_seen(name):
    import tensorflow as tf

    labels, logits = example(name, (4,), missing=False)
    signature = [tf.TensorSpec((None,) * labels.ndim, labels.dtype), tf.TensorSpec((None, None), "float32")]
    loss = make(name, from_logits=True)
    function = tf.function(lambda *inputs: loss(*inputs), input_signature=signature, autograph=False)
    assert_close(function(labels, logits), float(loss(labels, logits)))
    with pytest.raises(tf.errors.InvalidArgumentError, match="must have the .*shape"):
        function(labels[:1], logits)


@fast_for("token_mean")
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum_over_batch_size"])
def test_class_weights_of_1_change_nothing_for_targets_of_any_sum(reduction):
    targets = np.array([[[1, 0, 0], [0, 0, 0]], [[2, 0.5, 0], [0.1, 0.2, 0.3]]], "float32")
    logits = np.random.default_rng(0).normal(size=targets.shape).astype("float32")
    loss = lambda weight: kx.losses.CategoricalCrossentropy(  # noqa: E731
        from_logits=True, reduction=reduction, class_weight=weight
    )
    assert_close(float(loss(None)(targets, logits)), float(loss([1.0] * 3)(targets, logits)))


def test_an_all_zero_row_of_targets_is_not_counted_as_a_token():
    targets, logits = np.array([[0, 1.0], [0, 0]], "float32"), np.zeros((2, 2), "float32")
    loss = kx.losses.CategoricalCrossentropy(from_logits=True, reduction="token_mean")
    assert_close(float(loss(targets, logits)), np.log(2))


@pytest.mark.parametrize("ignored", [INF, -INF, NAN, 0.5])
def test_an_ignore_class_that_is_not_an_integer_ignores_no_label(ignored):
    loss = kx.kernels.sparse_softmax_cross_entropy(np.array([0, 1]), np.zeros((2, 2), "float32"), ignore_class=ignored)
    assert_close(to_numpy(loss), [np.log(2)] * 2)


def test_a_focal_weight_of_0_times_an_infinite_loss_is_0():
    for alpha, label, logit in ((0.0, 1.0, -INF), (1.0, 0.0, INF)):
        for gamma in (0.0, 2.0):
            loss = kx.kernels.sigmoid_cross_entropy(
                np.array([label]), tensor([logit], "float32"), focal_alpha=alpha, focal_gamma=gamma
            )
            assert np.array_equal(to_numpy(loss), [0])


def test_a_weight_that_is_no_number_leaves_no_trace_where_the_label_is_missing():
    labels, weights = np.array([[1, -1, 0], [0, 1, -1]]), np.array([[1, np.nan, 2], [0.5, 1, np.nan]], "float32")
    logits = tensor(np.array([[0.3, -1, 2], [1, 0.5, -0.2]], "float32"))
    loss = kx.losses.BinaryCrossentropy(from_logits=True, ignore_class=-1)
    got, right = (
        value_and_gradient(lambda x: loss(labels, x, w), logits)  # noqa: B023
        for w in (weights, np.nan_to_num(weights))
    )
    np.testing.assert_array_equal(got[0], right[0])
    np.testing.assert_array_equal(got[1], right[1])
