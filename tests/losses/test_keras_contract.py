"""Keras' contract of a loss, by Keras' own tests of the base class, run on subclasses of ours that override `call`."""

import copy
import importlib.util
import inspect
import pathlib
import pickle
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_xent as kx
from tests.backend import tensor
from tests.tiers import whole

SHIPPED = pathlib.Path(inspect.getfile(keras.losses.Loss)).with_name("loss_test.py")
# From 3.15 on a missing file is an error.
if not SHIPPED.exists() and tuple(map(int, keras.__version__.split(".")[:2])) < (3, 15):
    pytest.skip(f"the wheel of Keras {keras.__version__} has no tests of its losses", allow_module_level=True)


def _suite(base):
    """The shipped test module, with a subclass of our loss in place of that of `keras.losses.Loss`."""
    spec = importlib.util.spec_from_file_location(f"keras_loss_test_{base.__name__}", SHIPPED)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sum_over_batch_size = {"reduction": "sum_over_batch_size"}

    class ExampleLoss(base):
        def __init__(self, **arguments):
            super().__init__(**{**sum_over_batch_size, **arguments})

        def call(self, y_true, y_pred):
            return (y_true - y_pred) ** 2

    module.ExampleLoss = ExampleLoss
    return module.LossTest


class TestBinary(_suite(kx.losses.BinaryCrossentropy)):
    pass


class TestCategorical(_suite(kx.losses.CategoricalCrossentropy)):
    pass


class TestSparse(_suite(kx.losses.SparseCategoricalCrossentropy)):
    pass


class TestMaskedSequence(_suite(kx.losses.MaskedSequenceCrossentropy)):
    pass


@keras.saving.register_keras_serializable(package="contract")
class Doubled(kx.losses.MaskedSequenceCrossentropy):
    def call(self, y_true, y_pred):
        return 2.0 * super().call(y_true, y_pred)


@keras.saving.register_keras_serializable(package="contract")
class Weighted(kx.losses.SparseCategoricalCrossentropy):
    def __init__(self, beta=1.0, **kwargs):
        super().__init__(**kwargs)
        self.beta = beta


@keras.saving.register_keras_serializable(package="contract")
class Counted(kx.metrics.Perplexity):
    def __init__(self, beta=1.0, **kwargs):
        super().__init__(**kwargs)
        self.beta = beta

    def get_config(self):
        return {**super().get_config(), "beta": self.beta}


def test_an_overridden_call_has_our_masks_labels_and_weights_around_it():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 5)).astype("float32")
    # Labels past 2^24 are exact, those that are ignored or masked may be anything.
    labels, weights = rng.integers(0, 5, (3, 4)), rng.uniform(0.5, 2, (3, 4)).astype("float32")
    labels[0, 1], labels[2, 3], logits[1, 2] = -1, 99, np.nan
    mask = np.ones((3, 4), bool)
    mask[1, 2] = mask[2, 3] = False
    masked = tensor(logits)
    keras.src.backend.set_keras_mask(masked, tensor(mask))
    for options in {"ignore_class": -1}, {"ignore_class": -1, "class_weight": [1, 2, 3, 4, 5]}:
        one = float(kx.losses.MaskedSequenceCrossentropy(**options)(labels, masked, weights))
        np.testing.assert_allclose(float(Doubled(**options)(labels, masked, weights)), 2 * one, rtol=1e-6)


@whole
def test_an_overridden_call_is_used_with_a_fused_head_and_told_once():
    tokens = np.random.default_rng(0).integers(0, 50, (4, 6))
    values = []
    for loss in kx.losses.MaskedSequenceCrossentropy(), Doubled():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((6,)), keras.layers.Embedding(50, 8), kx.layers.LogitsDense(50)])
        model.compile("sgd", loss)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            values.append(model.fit(tokens, tokens, verbose=0).history["loss"][0])
    np.testing.assert_allclose(values[1], 2 * values[0], rtol=1e-5)
    told = [str(w.message) for w in caught if w.category is UserWarning]
    assert len(told) == 1 and told[0].startswith("Doubled overrides `call`, which gets the logits of layer")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Weighted(beta=2.0, from_logits=True, ignore_class=3),
        lambda: Doubled(ignore_class=0, reduction="sum"),
        lambda: Counted(beta=2.0, ignore_class=3),
        lambda: kx.losses.BinaryCrossentropy(from_logits=True, pos_weight=[1.0, 2.0], axis=1),
    ],
)
def test_subclasses_are_serialized_copied_and_pickled(make):
    original = make()
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(original))
    for other in again, type(original).from_config(original.get_config()), copy.deepcopy(original), copy.copy(original):
        assert type(other) is type(original) and other.get_config() == original.get_config()
    if isinstance(original, keras.losses.Loss):
        assert pickle.loads(pickle.dumps(original)).get_config() == original.get_config()


def test_a_scalar_of_an_overridden_call_is_weighed_as_by_keras():
    class Scalar(kx.losses.BinaryCrossentropy):
        def call(self, y_true, y_pred):
            return ops.mean(y_pred)

    class OfKeras(keras.losses.Loss):
        call = Scalar.call

    y, x = np.ones((2, 1), "float32"), np.array([[1.0], [3.0]], "float32")
    for weights in None, np.array([1.0, 2.0], "float32"):
        np.testing.assert_allclose(float(Scalar()(y, x, weights)), float(OfKeras()(y, x, weights)), rtol=1e-6)
