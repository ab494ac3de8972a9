"""Entropy and calibration error of probabilities: classes of probability 0, other axes, a forgotten argument."""

import warnings

import keras
import numpy as np
import pytest

import keras_xent as kx

# Keras' epsilon, 1e-7 for each of them, would be a probability of 0.01.
MANY = 100_003


def test_classes_of_probability_0_add_nothing():
    p = np.zeros((3, MANY), "float32")
    p[0, 5], p[1, :2], p[2, :4] = 1.0, 0.5, 0.25
    entropy, error = kx.metrics.Entropy(from_logits=False), kx.metrics.CalibrationError(from_logits=False)
    for metric in (entropy, error):
        metric.update_state(np.array([5, 0, 9]), p)
    assert float(entropy.result()) == pytest.approx(np.log(2.0), rel=1e-6)  # of 0, ln 2 and ln 4
    assert float(error.result()) == pytest.approx((0.5 + 0.25) / 3, rel=1e-6)  # right, right, wrong


def test_one_position_behind_the_class_axis_is_no_binary_classifier():
    logits = np.log([[0.9, 0.1], [0.6, 0.4]]).astype("float32")[..., None]  # [2, classes, 1]
    metric = kx.metrics.CalibrationError(axis=1)
    metric.update_state(np.array([[0], [1]]), logits)
    assert float(metric.result()) == pytest.approx((0.1 + 0.6) / 2, rel=1e-5)


@pytest.mark.parametrize("metric", [kx.metrics.Entropy, kx.metrics.CalibrationError])
def test_probabilities_that_are_taken_for_logits_warn(metric):
    with pytest.warns(UserWarning, match=f"{metric.__name__} has from_logits=True, but the rows of `y_pred` are prob"):
        metric().update_state(np.array([0, 1]), np.array([[0.9, 0.1], [0.4, 0.6]], "float32"))


def test_logits_that_are_taken_for_probabilities_warn():
    with pytest.warns(UserWarning, match="Perplexity has from_logits=False, but the output of .* holds values from -2"):
        kx.metrics.Perplexity(from_logits=False).update_state(np.array([0, 1]), np.array([[3.0, -2.0], [0.4, 0.6]]))


def test_the_sigmoid_of_a_binary_classifier_is_undone():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, "sigmoid", kernel_initializer="ones")])
    x, y = np.linspace(-2, 2, 16, dtype="float32")[:, None], np.arange(16) % 2
    metrics = {given: kx.metrics.CalibrationError(from_logits=given) for given in (True, False)}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = {}
        for given, metric in metrics.items():
            model.compile(loss=kx.losses.BinaryCrossentropy(), metrics=[metric])
            found[given] = model.evaluate(x, y, verbose=0, return_dict=True)["calibration_error"]
    assert found[True] == pytest.approx(found[False], rel=1e-6) and not warned
