"""The losses that are the others under the arguments of Keras, and the functions: Keras' values, and round trips."""

import inspect

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from keras_xent import _keras
from keras_xent.kernels._dtypes import dtype_of
from tests.backend import TWO_MODES, tensor, value_and_gradient
from tests.tiers import fast_for

rng = np.random.default_rng(0)
LOGITS = rng.normal(size=(6, 5)).astype("float32")
P = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
ONE_HOT = np.eye(5, dtype="float32")[rng.integers(0, 5, 6)]
SOFT = rng.dirichlet(np.ones(5), 6).astype("float32")
MANY = rng.integers(0, 2, (6, 5)).astype("float32")

CLASSES = {
    "BinaryFocalCrossentropy": ({"apply_class_balancing": True, "alpha": 0.3, "gamma": 1.5}, MANY),
    "CategoricalFocalCrossentropy": ({"alpha": [0.1, 0.2, 0.3, 0.4, 0.5], "gamma": 1.5}, ONE_HOT),
    "KLDivergence": ({}, SOFT),
}
FUNCTIONS = {
    "binary_crossentropy": ({"label_smoothing": 0.1}, MANY),
    "binary_focal_crossentropy": ({"apply_class_balancing": True, "label_smoothing": 0.1}, MANY),
    "categorical_crossentropy": ({"label_smoothing": 0.1}, ONE_HOT),
    "categorical_focal_crossentropy": ({"alpha": 0.7}, ONE_HOT),
    "kl_divergence": ({}, SOFT),
    "sparse_categorical_crossentropy": ({"ignore_class": 2}, ONE_HOT.argmax(-1)),
}


@fast_for("*-eager")
@pytest.mark.parametrize("mode", TWO_MODES)
@pytest.mark.parametrize("name", CLASSES)
def test_values_and_gradients_are_those_of_keras(name, mode):
    options, y = CLASSES[name]
    ours, theirs = getattr(kx.losses, name), getattr(keras.losses, name)
    for given in {}, options:
        for loss in (None, "sum_over_batch_size"):
            got, right = (
                value_and_gradient(lambda p: kind(reduction=loss, **given)(y, p), tensor(P), mode=mode)  # noqa: B023
                for kind in (ours, theirs)
            )
            np.testing.assert_allclose(got[0], right[0], rtol=2e-6, atol=2e-7)
            np.testing.assert_allclose(got[1], right[1], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", [*CLASSES, *FUNCTIONS])
def test_signatures_are_those_of_keras(name):
    ours, theirs = (inspect.signature(getattr(module.losses, name)) for module in (kx, keras))
    described = [[(p.name, p.default) for p in one.parameters.values()] for one in (ours, theirs)]
    assert described[0] == described[1]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_those_of_keras(name):
    options, y = FUNCTIONS[name]
    ours, theirs = (getattr(module.losses, name) for module in (kx, keras))
    for given in {}, options:
        got, right = ours(y, P, **given), theirs(ops.convert_to_tensor(y), ops.convert_to_tensor(P), **given)
        np.testing.assert_allclose(ops.convert_to_numpy(got), ops.convert_to_numpy(right), rtol=2e-6, atol=2e-7)
    # In float64 too, of which float32 would lose half of the digits.
    wide = ops.convert_to_tensor(P.astype("float64"))
    got, right = (function(ops.convert_to_tensor(y), wide) for function in (ours, theirs))
    assert got.dtype == right.dtype
    digits = 1e-12 if dtype_of(right) == "float64" else 2e-6
    np.testing.assert_allclose(ops.convert_to_numpy(got), ops.convert_to_numpy(right), rtol=digits, atol=digits / 10)
    # Given to `compile`, and loaded again.
    config = keras.saving.serialize_keras_object(ours)
    assert keras.saving.deserialize_keras_object(config) is ours


@pytest.mark.parametrize("name", CLASSES)
def test_round_trips(name):
    options, y = CLASSES[name]
    loss = getattr(kx.losses, name)(reduction="sum", name="mine", dtype="float32", **options)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    assert type(again) is type(loss) and again.get_config() == loss.get_config()
    assert float(again(y, P)) == float(loss(y, P))


@pytest.mark.parametrize("kind", [keras.Variable, None], ids=["variable", "array"])
@pytest.mark.parametrize("alpha", [0.25, [0.1, 0.2, 0.3, 0.4, 0.5]], ids=["number", "list"])
def test_focal_weights_may_be_variables_and_arrays(alpha, kind):
    y, p = ONE_HOT[:5], P[:5]  # as many examples as classes
    given = np.array(alpha, "float32") if kind is None else kind(alpha)
    loss, expected = (kx.losses.CategoricalFocalCrossentropy(a, reduction=None) for a in (given, alpha))
    np.testing.assert_allclose(ops.convert_to_numpy(loss(y, p)), ops.convert_to_numpy(expected(y, p)), rtol=1e-6)
    np.testing.assert_allclose(loss.get_config()["alpha"], alpha, rtol=1e-6)
    if kind is None:
        got, right = (kx.losses.categorical_focal_crossentropy(y, p, alpha=a) for a in (given, alpha))
        np.testing.assert_allclose(ops.convert_to_numpy(got), ops.convert_to_numpy(right), rtol=1e-6)
    else:
        given.assign(0.0 * given)
        np.testing.assert_array_equal(ops.convert_to_numpy(loss(y, p)), 0.0)


@pytest.mark.parametrize("how", ["mask", "sample_weight"])
def test_targets_that_are_no_numbers_leave_no_trace_in_rows_that_do_not_count(how):
    counts = np.array([True, True, False, True, True, False])
    y = np.where(counts[:, None], SOFT, np.nan)
    loss = kx.losses.KLDivergence()

    def value(p):
        if how == "sample_weight":
            return loss(y, p, counts.astype("float32"))
        p = p * 1.0
        _keras.set_mask(p, tensor(counts))
        return loss(y, p)

    got = value_and_gradient(value, tensor(P))
    right = value_and_gradient(lambda p: loss(np.nan_to_num(y), p, counts.astype("float32")), tensor(P))
    scale = 6 / 4 if how == "mask" else 1.0
    np.testing.assert_allclose(got[0], scale * right[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], scale * right[1], rtol=1e-6)


def test_divergence_is_0_where_the_prediction_is_right_and_finite_where_it_is_wrong():
    loss = kx.losses.KLDivergence()
    np.testing.assert_allclose(float(loss(SOFT, SOFT)), 0.0, atol=1e-6)
    certain = tensor(np.array([[1.0, 0.0]], "float32"))
    value, gradient = value_and_gradient(lambda p: loss(np.array([[0.0, 1.0]], "float32"), p), certain)
    np.testing.assert_allclose(value, -np.log(1e-7), rtol=1e-6)
    # Keras' is 0, and such a model does not learn.
    np.testing.assert_allclose(gradient[0, 1], -1e7, rtol=1e-6)
