"""Marks of the two tiers of the suite."""

import pytest

whole = pytest.mark.whole


def sample(cases, fast):
    """The parameters of a sweep: the fast suite takes those in `fast`, the whole suite all of them."""
    assert all(case in cases for case in fast), "the fast suite would miss a case that is not there"
    return [pytest.param(*_each(case), marks=() if case in fast else whole) for case in cases]


def _each(case):
    return case if isinstance(case, tuple) else (case,)
