"""A process that holds the peers of a library, and makes a call on request: `python -m tools.bench.worker MODULE`.

Requests and answers are lines of JSON. Between them it waits for the next line, and takes no time from the others.
"""

import gc
import importlib
import json
import os
import sys
import time

import numpy as np

from tools.bench import peak


class Worker:
    """The requests that a worker answers, by name."""

    def __init__(self, module: str) -> None:
        self._library = importlib.import_module(module)
        self._calls: dict = {}
        self._cases: dict = {}

    def versions(self) -> dict:
        """Of the library and of what it runs on."""
        return self._library.versions()

    def make(self, name: str, case: dict, folder: str) -> None:
        """Makes the peer ready, and reads its inputs."""
        self._calls[name] = self._library.peer(name, case, folder)
        self._cases[name] = case

    def time(self, name: str) -> float:
        """Milliseconds of one call, until its results are there; of one step, for calls that make several.

        `queued` calls of a case are timed together: a GPU computes while the next are prepared, as in `fit`.
        """
        return self._timed(name, self._cases[name].get("queued", 1))[0]

    def save(self, name: str, folder: str) -> float:
        """The results of a call as files, and its milliseconds; if it is the first, those of compiling included."""
        milliseconds, results = self._timed(name)
        if "compared" in self._cases[name]:
            part = slice(self._cases[name]["compared"])
            results = {key: array[part] if array.ndim else array for key, array in results.items()}
        for key, array in self._library.arrays(results).items():
            np.save(os.path.join(folder, f"{key}.npy"), array)
        return milliseconds

    def _timed(self, name, calls=1):
        call = self._calls[name]
        start = time.perf_counter()
        for _ in range(calls - 1):
            call.launch()
        results = call()
        elapsed = time.perf_counter() - start
        return round(1e3 * elapsed / (calls * getattr(call, "steps", 1)), 4 if calls > 1 else 3), results

    def operations(self, name: str) -> int:
        """How many operations the graph of a peer has."""
        return self._calls[name].operations

    def peak(self, name: str, calls: int) -> float:
        """Megabytes by which the memory rises above where it stands when the inputs are there.

        On a CPU compilation is included; on a GPU it is the memory of the device, in which nothing is compiled.
        """
        gc.collect()
        of_device = getattr(self._library, "device_megabytes", None)
        if self._cases[name].get("device") == "gpu" and of_device:
            return round(of_device(self._calls[name]))
        peak.reset()
        start = peak.highest()
        for _ in range(calls):
            self._calls[name]()
        return round((peak.highest() - start) / 1e6)

    def forget(self) -> None:
        """Frees the peers, their inputs and their programs."""
        self._calls.clear()
        self._cases.clear()
        self._library.forget()
        gc.collect()


def main() -> None:
    """Answers line by line, until there is none."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    worker = None
    for line in sys.stdin:
        try:
            worker = worker or Worker(sys.argv[1])
            request, arguments = json.loads(line)
            answer = {"answer": getattr(worker, request)(*arguments)}
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            answer = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
