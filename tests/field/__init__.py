"""Faults that real uses have met: each test ends in the right value."""
