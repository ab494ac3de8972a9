"""Which tests run: on which backend, and of which of the two tiers.

The fast suite is every test without the mark `whole`. `--whole` runs all tests, `--rest` those that the fast suite
leaves out. What was left out is printed: a test that was not run has not passed.
"""

import gc
import os
import sys
from fnmatch import fnmatchcase

import pytest

from tests.durations import FAST, Durations

# Else a keras.json in the home directory would decide.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
BACKEND = os.environ["KERAS_BACKEND"]

# What these show hardly depends on the backend, or is skipped on JAX for the most part: there they belong to the whole
# suite.
BACKEND_NEUTRAL = (
    "tests/callbacks/",
    "tests/field/test_warnings.py",
    "tests/layers/test_fuse_head.py",
    "tests/layers/test_keras_hub.py",
    "tests/losses/test_accumulation_warning.py",
    "tests/losses/test_activations.py",
    "tests/losses/test_arguments.py",
    "tests/losses/test_contract.py",
    "tests/losses/test_errors.py",
    "tests/losses/test_family.py",
    "tests/losses/test_keras_contract.py",
    "tests/losses/test_keras_failures.py",
    "tests/losses/test_keras_suite.py",
    "tests/losses/test_probabilities.py",
    "tests/losses/test_reduction.py",
    "tests/metrics/test_bits_per_byte.py",
    "tests/metrics/test_byte_lengths.py",
    "tests/metrics/test_entropy_and_calibration.py",
    "tests/metrics/test_groups.py",
    "tests/metrics/test_perplexity.py",
    "tests/metrics/test_token_crossentropy.py",
)
LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser):
    group = parser.getgroup("keras_xent")
    group.addoption("--whole", action="store_true", help="run every test, those marked `whole` too")
    group.addoption("--rest", action="store_true", help="run only the tests that the fast suite leaves out")
    group.addoption(
        "--durations-check",
        action="store_true",
        help=f"repeat the fast tests that took over {FAST:g} s of processor time, and fail those over the limit",
    )
    group.addoption(
        "--durations-limit", type=float, default=FAST, metavar="SECONDS", help=f"the limit, if not {FAST:g} s"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "whole: slow, sweeping or redundant: left out of the fast suite")
    config.addinivalue_line("markers", "fast_for(*patterns): the parameters with which the fast suite runs a test")
    config.stash[LEFT_OUT] = 0
    config.pluginmanager.register(Durations(config, BACKEND), "durations")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        mark = item.get_closest_marker("fast_for")
        is_left_out = mark is not None and not any(fnmatchcase(item.callspec.id, pattern) for pattern in mark.args)
        if is_left_out or (BACKEND == "jax" and item.nodeid.startswith(BACKEND_NEUTRAL)):
            item.add_marker(pytest.mark.whole)
    if not config.getoption("--whole"):
        rest = config.getoption("--rest")
        chosen = [item for item in items if (item.get_closest_marker("whole") is not None) == rest]
        left_out = [item for item in items if (item.get_closest_marker("whole") is not None) != rest]
        config.stash[LEFT_OUT] = len(left_out)
        items[:] = chosen
        config.hook.pytest_deselected(items=left_out)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Each worker of pytest-xdist has left out the same tests."""
    left_out = getattr(node, "workeroutput", {}).get("left_out", 0)
    node.config.stash[LEFT_OUT] = max(node.config.stash[LEFT_OUT], left_out)


def pytest_terminal_summary(terminalreporter, config):
    number, rest = config.stash[LEFT_OUT], config.getoption("--rest")
    if number:
        tier, command = ("of the fast suite", "tools/test") if rest else ("marked `whole`", "tools/test --rest")
        terminalreporter.write_line(f"Left out on {BACKEND}: {number} tests {tier}, which {command} runs.")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Programs are freed folder by folder: all of them take gigabytes, which every garbage collection walks through."""
    if "keras" not in sys.modules or (nextitem is not None and nextitem.path.parent == item.path.parent):
        return
    import keras

    from tests import internals

    internals.clear_cache()
    keras.backend.clear_session()
    if BACKEND == "jax":
        import jax

        jax.clear_caches()
    gc.collect()
