"""The two tiers of the suite, what is printed of them, and the limit on the time of a fast test."""

import subprocess
import sys

import pytest

from tests.backend import BACKEND, environment
from tests.tiers import whole

TESTS = """
import time
import pytest

def test_fast():
    pass

def test_slow():
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass

@pytest.mark.whole
def test_sweep():
    pass
"""
# Of test functions of a fraction of a second.
LIMIT = "from tests import durations\ndurations.FAST = 0.2\n"


@pytest.fixture
def run(tmp_path):
    """pytest with our conftest.py on the three tests above: its exit status and what it prints."""
    (tmp_path / "test_three.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text(LIMIT)

    def run(*options):
        command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "--rootdir", tmp_path, *options, tmp_path]
        done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout

    return run


def test_the_fast_suite_leaves_out_what_is_marked_whole_and_says_so(run):
    status, printed = run()
    assert status == 0
    assert "2 passed, 1 deselected" in printed
    assert f"Left out on {BACKEND}: 1 tests marked `whole`, which tools/test --rest runs." in printed


@whole
def test_rest_runs_only_what_the_fast_suite_leaves_out(run):
    status, printed = run("--rest", "-v")
    assert status == 0
    assert "test_sweep PASSED" in printed and "1 passed, 2 deselected" in printed
    assert f"Left out on {BACKEND}: 2 tests of the fast suite, which tools/test runs." in printed


@whole
def test_whole_runs_everything(run):
    status, printed = run("--whole")
    assert status == 0
    assert "3 passed" in printed and "Left out" not in printed


@whole
@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "two workers"])
def test_a_slow_test_is_printed_and_fails_the_check_of_durations_if_it_is_slow_again(run, workers):
    status, printed = run(*workers)
    assert status == 0
    assert "test_three.py::test_slow\n" in printed.partition("Over 0.2 s of processor time")[2]
    assert run("--durations-check")[0] == 0
    run(*workers)
    status, printed = run("--durations-check", "--durations-limit=0.2")
    assert status == 1
    assert "1 failed, 2 deselected" in printed
    assert "of processor time with its programs compiled. A test of the fast suite may take 0.2 s" in printed


def test_without_slow_tests_the_check_of_durations_has_nothing_to_run(run):
    run("-k", "fast")
    assert run("--durations-check")[0] == 5


def test_the_fast_suite_runs_a_test_for_the_named_parameters(run, tmp_path):
    (tmp_path / "test_three.py").write_text(
        "import pytest\n\n"
        "@pytest.mark.fast_for('b*')\n"
        "@pytest.mark.parametrize('name', ['apple', 'banana', 'berry'])\n"
        "def test_fruit(name):\n    pass\n"
    )
    _, printed = run("-v")
    assert "2 passed, 1 deselected" in printed and "test_fruit[apple]" not in printed
    _, printed = run("--rest", "-v")
    assert "1 passed, 2 deselected" in printed and "test_fruit[apple] PASSED" in printed
