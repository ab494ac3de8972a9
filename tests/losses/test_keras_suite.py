"""Keras' own tests of its losses, as its wheel ships them, run on ours."""

import importlib.util
import inspect
import pathlib
import types

import keras
import pytest

import keras_xent as kx
from tests.tiers import whole

OURS = {name: getattr(kx.losses, name) for name in kx.losses.__all__}

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


@whole
class TestBinaryFocal(SUITE.BinaryFocalCrossentropyTest):
    pass


class TestCategorical(SUITE.CategoricalCrossentropyTest):
    pass


@whole
class TestCategoricalFocal(SUITE.CategoricalFocalCrossentropyTest):
    pass


class TestKLDivergence(SUITE.KLDivergenceTest):
    pass


class TestSparse(SUITE.SparseCategoricalCrossentropyTest):
    pass


def test_every_crossentropy_of_the_suite_is_run():
    there = {name for name in vars(SUITE) if name.endswith(("CrossentropyTest", "KLDivergenceTest"))}
    run = {value.__base__.__name__ for name, value in globals().items() if name.startswith("Test")}
    assert run == there
