"""Which backend the tests run on, decided before anything imports Keras: the environment's, else TensorFlow."""

import gc
import os

import pytest

# Else a keras.json in the home directory would decide.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def pytest_addoption(parser):
    parser.addoption("--whole", action="store_true", help="run the examples whole and from three seeds, not --smoke")


@pytest.fixture(autouse=True, scope="module")
def programs_are_freed():
    """The programs of the whole suite would take gigabytes, which every collection of garbage walks through."""
    yield
    import keras

    from keras_xent.kernels import _compile

    _compile.forget()
    keras.backend.clear_session()
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()
    gc.collect()
