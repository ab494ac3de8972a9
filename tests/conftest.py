"""Which backend the tests run on, decided before anything imports Keras: the environment's, else TensorFlow."""

import gc
import os

import pytest

# Else a keras.json in the home directory would decide.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def pytest_addoption(parser):
    parser.addoption("--whole", action="store_true", help="run the examples whole and from three seeds, not --smoke")


def pytest_configure(config):
    config.addinivalue_line("markers", "whole: takes minutes, and runs with --whole only")


def pytest_collection_modifyitems(config, items):
    """Leaves out what is not asked for: a test that was not run has not passed."""
    if not config.getoption("--whole"):
        left_out = [item for item in items if item.get_closest_marker("whole")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True, scope="module")
def programs_are_freed():
    """The programs of the whole suite would take gigabytes, which every collection of garbage walks through."""
    yield
    import keras

    from keras_xent.kernels import _compiled

    _compiled.clear_cache()
    keras.backend.clear_session()
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()
    gc.collect()
