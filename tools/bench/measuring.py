"""Measurement: results are compared first, then the libraries are timed in turn."""

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench import agreement, data, processes
from tools.bench.rows import QUICK_ROUNDS, Work
from tools.bench.workers import Missing, Worker, Workers

# Beside the call that compiles and is compared: the second call of a Keras model traces it once more.
WARM_UP = 1
# Seconds, after which it is looked whether threads that spin for a moment after a call have gone to sleep.
NAP, NAPS = 0.002, 25


def record(work: Work, workers: Workers, rounds: int, warm_up: int = WARM_UP) -> dict:
    """Results: a list of numbers by peer, and for missing peers the reason."""
    found = {"row": work.row, "case": work.case, "unit": work.unit, "peers": list(work.peers)}
    if work.case["question"] == "import":
        return found | processes.imports(work, rounds)
    if work.case["question"] == "second_process":
        return found | processes.second_process(work, min(rounds, QUICK_ROUNDS))
    if work.unit == "compilations":
        return found | processes.compilations(work, workers.libraries)
    with tempfile.TemporaryDirectory() as folder:
        data.write(work.case, Path(folder))
        if work.unit == "milliseconds":
            return found | _times(work, workers, rounds, warm_up, Path(folder))
        if work.unit == "error":
            expected = agreement.reference(work.case, folder)
            return found | _once(work, workers, folder, lambda worker, name: _largest_error(worker, name, expected))
        if work.unit == "operations":
            return found | _once(work, workers, folder, lambda worker, name: worker.operations(name))
        calls = work.case.get("calls", 1)
        # A process can tell the memory of a GPU of each peer by itself.
        fresh = work.case.get("device") != "gpu"
        return found | _once(work, workers, folder, lambda worker, name: worker.peak(name, calls), fresh=fresh)


class _Lost(Exception):
    """A peer that took its process, and so the other peers of its library, along."""


def _times(work, workers, rounds, warm_up, folder):
    expected = agreement.reference(work.case, folder)
    lost: dict[str, str] = {}
    while True:
        peers = {name: library for name, library in work.peers.items() if name not in lost}
        try:
            calls, first, missing = _prepared(work._replace(peers=peers), workers, folder, expected)
            times, awake = in_turn(calls, rounds, warm_up, workers)
            return {"rounds": rounds, "values": times, "first": first, "missing": lost | missing, "awake": awake}
        except _Lost as who:
            name, reason = who.args
            lost[name] = reason
        finally:
            for worker in workers.there():
                worker.forget()


def _prepared(work, workers, folder, expected):
    """The peers that do the same work, the milliseconds of their first calls, and why the others are missing."""
    calls: dict[str, Callable[[], float]] = {}
    first, missing = {}, {}
    for name, library in work.peers.items():
        worker = None
        try:
            worker = workers[library]
            worker.make(name, work.case, str(folder))
            with tempfile.TemporaryDirectory() as results:
                first[name] = worker.save(name, results)
                arrays = {path.stem: np.load(path, mmap_mode="r") for path in Path(results).glob("*.npy")}
                if name != "floor" and name not in work.case.get("beside", ()):
                    if expected is None:
                        expected = {key: np.array(value) for key, value in arrays.items()}
                    agreement.must_agree(arrays, expected, work.case["dtype"])
            calls[name] = functools.partial(_timed, worker, name)
        except Missing as reason:
            if worker and worker.ended():
                raise _Lost(name, str(reason)) from None
            missing[name] = str(reason)
        except agreement.Disagreement as reason:
            if name.startswith("ours"):
                raise agreement.Disagreement(f"{name}: {reason}") from None
            missing[name] = str(reason)
    return calls, {name: first[name] for name in calls}, missing


def _timed(worker, name):
    try:
        return worker.time(name)
    except Missing as reason:
        raise _Lost(name, str(reason)) from None


def in_turn(
    calls: dict[str, Callable[[], float]], rounds: int, warm_up: int, workers: Workers
) -> tuple[dict[str, list[float]], float]:
    """Milliseconds of each call, warm, and the share of the time in which processes ran that should have slept.

    A B C, B C A, C A B: what else the machine does meets all of them, and so does what the call before has left behind.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    passed = stolen = 0.0
    for turn in range(-warm_up, rounds):
        names = names[1:] + names[:1]
        for name in names:
            _until_asleep(workers)
            before, start = _processor_seconds(workers), time.perf_counter()
            milliseconds = calls[name]()
            after = _processor_seconds(workers)
            if turn >= 0:
                times[name].append(milliseconds)
                passed += time.perf_counter() - start
                # The one that was called has had the most.
                spent = sorted(after[worker] - before.get(worker, 0.0) for worker in after)
                stolen += sum(spent[:-1])
    return times, round(stolen / passed, 4) if passed else 0.0


def _until_asleep(workers):
    for _ in range(NAPS):
        before = sum(_processor_seconds(workers).values())
        time.sleep(NAP)
        if sum(_processor_seconds(workers).values()) - before < 0.05 * NAP:
            return


def _processor_seconds(workers):
    return {id(worker): worker.processor_seconds() for worker in workers.there()}


def _once(
    work: Work, workers: Workers, folder: str, value: Callable[[Worker, str], float], *, fresh: bool = False
) -> dict[str, Any]:
    """One number of each peer, `value(worker, name)`, in a process of its library or in a fresh one."""
    values, missing = {}, {}
    for name, library in work.peers.items():
        try:
            worker = Worker(workers.libraries[library]) if fresh else workers[library]
            try:
                worker.make(name, work.case, folder)
                values[name] = [value(worker, name)]
            finally:
                (worker.end if fresh else worker.forget)()
        except Missing as reason:
            missing[name] = str(reason)
    return {"rounds": 1, "values": values, "missing": missing}


def _largest_error(worker, name, expected):
    with tempfile.TemporaryDirectory() as results:
        worker.save(name, results)
        arrays = {path.stem: np.load(path) for path in Path(results).glob("*.npy")}
    return max(agreement.errors(arrays, expected).values())


def versions(workers: Workers) -> dict[str, str | None]:
    """Of every library, None where it is missing."""
    found: dict[str, str | None] = {}
    for name in workers.libraries:
        try:
            found |= workers[name].versions()
        except Missing:
            found[name] = None
    return found
