"""Keras' own tests of its losses, as its wheel ships them, run on ours."""

import importlib.util
import inspect
import pathlib
import types

import keras
import pytest
from keras import ops

import keras_xent as kx


@keras.saving.register_keras_serializable(package="keras_suite")
class BinaryFocalCrossentropy(kx.losses.BinaryCrossentropy):
    """Our binary loss under the arguments of `keras.losses.BinaryFocalCrossentropy`."""

    def __init__(
        self,
        apply_class_balancing=False,
        alpha=0.25,
        gamma=2.0,
        from_logits=False,
        label_smoothing=0.0,
        axis=-1,
        reduction="sum_over_batch_size",
        name="binary_focal_crossentropy",
        dtype=None,
    ):
        focal_alpha = alpha if apply_class_balancing else None
        focal = {"focal_gamma": gamma, "focal_alpha": focal_alpha}
        super().__init__(from_logits, label_smoothing, axis, reduction, name, dtype, **focal)
        self.apply_class_balancing = apply_class_balancing
        self.alpha = alpha
        self.gamma = gamma


@keras.saving.register_keras_serializable(package="keras_suite")
class CategoricalFocalCrossentropy(kx.losses.CategoricalCrossentropy):
    """Our categorical loss under the arguments of `keras.losses.CategoricalFocalCrossentropy`."""

    def __init__(
        self,
        alpha=0.25,
        gamma=2.0,
        from_logits=False,
        label_smoothing=0.0,
        axis=-1,
        reduction="sum_over_batch_size",
        name="categorical_focal_crossentropy",
        dtype=None,
    ):
        focal = {"focal_gamma": gamma}
        super().__init__(from_logits, label_smoothing, axis, reduction, name, dtype, **focal)
        self.alpha = alpha
        self.gamma = gamma

    def __call__(self, y_true, y_pred, sample_weight=None):
        return ops.multiply(self.alpha, super().__call__(y_true, y_pred, sample_weight))


def sparse_categorical_crossentropy(y_true, y_pred, **arguments):
    """Our sparse loss as the function that Keras has beside its class."""
    return kx.losses.SparseCategoricalCrossentropy(reduction=None, **arguments)(y_true, y_pred)


OURS = {
    "BinaryCrossentropy": kx.losses.BinaryCrossentropy,
    "BinaryFocalCrossentropy": BinaryFocalCrossentropy,
    "CategoricalCrossentropy": kx.losses.CategoricalCrossentropy,
    "CategoricalFocalCrossentropy": CategoricalFocalCrossentropy,
    "SparseCategoricalCrossentropy": kx.losses.SparseCategoricalCrossentropy,
    "sparse_categorical_crossentropy": sparse_categorical_crossentropy,
}

# Keras takes another axis than the last one on torch only, and has these tests expect an error on other backends, or
# skips them. Ours takes any axis everywhere, so they follow the branch written for torch.
AXIS_TESTS = {
    "test_binary_segmentation_different_axis",
    "test_multi_class_segmentation_different_axis",
    "test_squeezes_singleton_class_dim_on_user_axis",
}


SHIPPED = pathlib.Path(inspect.getfile(keras.losses.Loss)).with_name("losses_test.py")
# From 3.15 on a missing file is an error.
if not SHIPPED.exists() and tuple(map(int, keras.__version__.split(".")[:2])) < (3, 15):
    pytest.skip(f"the wheel of Keras {keras.__version__} has no tests of its losses", allow_module_level=True)


def _suite():
    """The shipped test module, with our losses in its namespace of losses."""
    spec = importlib.util.spec_from_file_location("keras_losses_test", SHIPPED)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.losses = types.SimpleNamespace(**{**vars(module.losses), **OURS})
    skipped = "test_squeezes_singleton_class_dim_on_user_axis"
    del getattr(module.SparseCategoricalCrossentropyTest, skipped).pytestmark
    return module


SUITE = _suite()


@pytest.fixture(autouse=True)
def _axis_tests_see_torch(request, monkeypatch):
    if request.node.name in AXIS_TESTS:
        torch = types.SimpleNamespace(**{**vars(SUITE.backend), "backend": lambda: "torch"})
        monkeypatch.setattr(SUITE, "backend", torch)


class TestBinary(SUITE.BinaryCrossentropyTest):
    pass


class TestBinaryFocal(SUITE.BinaryFocalCrossentropyTest):
    pass


class TestCategorical(SUITE.CategoricalCrossentropyTest):
    pass


class TestCategoricalFocal(SUITE.CategoricalFocalCrossentropyTest):
    pass


class TestSparse(SUITE.SparseCategoricalCrossentropyTest):
    pass


def test_every_crossentropy_of_the_suite_is_run():
    there = {name for name in vars(SUITE) if name.endswith("CrossentropyTest")}
    run = {value.__base__.__name__ for name, value in globals().items() if name.startswith("Test")}
    assert run == there
