"""The limit on the time of a test of the fast suite, and what the tests take.

Time is processor time, of the test or of its fixtures, in the test's process and its children: what else the machine
does adds nothing to it. A first run also compiles the test's programs, which says more about the state of the compile
caches than about the test. So every run only notes which fast tests were over the limit, and `--durations-check`
repeats these, with their programs compiled, and fails those that are over it again.
"""

import os
import resource

import pytest

FAST = 5.0  # seconds


class Durations:
    """A plugin of pytest."""

    def __init__(self, config, backend):
        self.config = config
        self.checks = config.getoption("--durations-check")
        self.limit = config.getoption("--durations-limit")
        # The slow tests of earlier runs, by name, kept in pytest's cache.
        self.key = f"keras_xent/slow_on_{backend}"
        self.slow, self.ran, self.peak = {}, set(), 0.0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        if self.checks:
            slow = config.cache.get(self.key, {}) if hasattr(config, "cache") else {}
            others = [item for item in items if item.nodeid not in slow]
            items[:] = [item for item in items if item.nodeid in slow]
            config.hook.pytest_deselected(items=others)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item):
        """Fixtures of a module are part of its first test."""
        return (yield from _timed(item, "setup"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        return (yield from _timed(item, "call"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if self.checks and report.passed and _seconds(report) > self.limit:
            report.outcome = "failed"
            report.longrepr = (
                f"{item.nodeid} took {_seconds(report):.1f} s of processor time with its programs compiled. A test of "
                f"the fast suite may take {self.limit:g} s: make it smaller, or mark it with `@pytest.mark.whole`."
            )
        return report

    def pytest_runtest_logreport(self, report):
        """Of every test, in the process that reports for all workers."""
        self.ran.add(report.nodeid)
        if _seconds(report) > FAST and "whole" not in report.keywords:
            self.slow[report.nodeid] = _seconds(report)

    def pytest_sessionfinish(self, session):
        self.peak = max(self.peak, _peak_gigabytes())
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["peak"] = self.peak
        elif self.ran and hasattr(self.config, "cache"):
            known = self.config.cache.get(self.key, {})
            others = {name: seconds for name, seconds in known.items() if name not in self.ran}
            self.config.cache.set(self.key, others | self.slow)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error):
        self.peak = max(self.peak, getattr(node, "workeroutput", {}).get("peak", 0.0))

    def pytest_terminal_summary(self, terminalreporter):
        if self.slow:
            terminalreporter.write_line(f"Over {FAST:g} s of processor time (tools/test --durations-check):")
        for name, seconds in sorted(self.slow.items(), key=lambda pair: -pair[1]):
            terminalreporter.write_line(f"  {seconds:5.1f} s  {name}")
        if self.ran:
            terminalreporter.write_line(f"The largest process of the tests had {self.peak:.1f} GB.")


def _processor_seconds():
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _timed(item, phase):
    start = _processor_seconds()
    try:
        return (yield)
    finally:
        item.user_properties.append((f"processor seconds of {phase}", round(_processor_seconds() - start, 2)))


def _seconds(report):
    return dict(report.user_properties).get(f"processor seconds of {report.when}", 0.0)


def _peak_gigabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
