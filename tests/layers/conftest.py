import pytest

from keras_xent.kernels import _linear_loop
from tests.internals import count_linear_calls


@pytest.fixture
def calls(monkeypatch):
    """How often the linear kernel is called."""
    return count_linear_calls(monkeypatch)


@pytest.fixture
def formed(monkeypatch):
    """The names of the gradients that the loop has formed."""
    found, run = set(), _linear_loop.run

    def counted(*args, **static):
        result = run(*args, **static)
        names = ("hidden", "kernel", "bias", "projected", "factor")
        found.update(name for name, one in zip(names, result.gradients, strict=True) if one is not None)
        return result

    monkeypatch.setattr(_linear_loop, "run", counted)
    return found
