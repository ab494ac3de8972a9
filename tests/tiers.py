"""Marks of the two tiers of the suite."""

import pytest

whole = pytest.mark.whole

# Patterns of the parameters, as the names of the tests show them, with which the fast suite runs a test.
fast_for = pytest.mark.fast_for


def sample(cases, fast, *, one_argument=False):
    """The parameters of a sweep: the fast suite takes those in `fast`, the whole suite all of them.

    Tuples hold several arguments, unless it is said that they are one.
    """
    assert all(case in cases for case in fast), "a case of the fast suite is not one of the sweep"
    several = [case if isinstance(case, tuple) and not one_argument else (case,) for case in cases]
    return [pytest.param(*each, marks=() if case in fast else whole) for case, each in zip(cases, several, strict=True)]
