"""Measurements that start processes: the time of an import, and the number of compilations of XLA."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.bench.rows import Work
from tools.bench.workers import ROOT, Library, Missing, Worker


def imports(work: Work, rounds: int) -> dict:
    """Milliseconds of fresh processes, in turn. The first turn fills the caches of the disk."""
    times: dict[str, list[float]] = {name: [] for name in work.peers}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    for turn in range(-1, rounds):
        for name, program in work.peers.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=environment)
            if turn >= 0:
                times[name].append(round(1e3 * (time.perf_counter() - start)))
    return {"rounds": rounds, "values": times, "missing": {}}


def compilations(work: Work, libraries: dict[str, Library]) -> dict:
    """Programs that XLA has been given, each peer in a fresh process; XLA leaves a file for each of them."""
    values: dict[str, list[float]] = {}
    missing = {}
    for name, library in work.peers.items():
        with tempfile.TemporaryDirectory() as folder:
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_hlo_as_text"
            worker = Worker(libraries[library], XLA_FLAGS=flags)
            try:
                worker.make(name, work.case, folder)
                for _ in range(work.case["steps"]):
                    worker.time(name)
                values[name] = [len(list(Path(folder).glob("*before_optimizations.txt")))]
            except Missing as reason:
                missing[name] = str(reason)
            finally:
                worker.end()
    return {"rounds": 1, "values": values, "missing": missing}
