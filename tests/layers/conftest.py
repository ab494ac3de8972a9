import pytest

from tests.internals import count_linear_calls


@pytest.fixture
def calls(monkeypatch):
    """How often the linear kernel is called."""
    return count_linear_calls(monkeypatch)
