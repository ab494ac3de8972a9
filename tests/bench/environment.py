"""A library for tools/bench whose versions are the variables of its process."""

import os


def versions():
    return sorted(os.environ)
