"""The processes of the libraries, as seen by who tells them what to do."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent


class Library(NamedTuple):
    """The module of a library's peers, and the Python that runs it."""

    module: str
    backend: str = "tensorflow"
    # An environment of its own, for what conflicts with ours; None: the one that runs this.
    folder: str | None = None


LIBRARIES = {
    "tensorflow": Library("tools.bench.peers.tensorflow"),
    "jax": Library("tools.bench.peers.jax", backend="jax"),
    "pytorch": Library("tools.bench.peers.pytorch", folder=".venv-torch"),
    "tokamax": Library("tools.bench.peers.tokamax", folder=".venv-tokamax"),
}


# With these, programs of earlier runs are read from the disk: first steps and memory would leave out the compiler.
_KEPT_PROGRAMS = ("TF_XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")


class Missing(Exception):
    """A peer is not there, or cannot do what is asked; the sentence says why."""


class Worker:
    """One process of a library. Every method of worker.Worker is one here."""

    def __init__(self, library: Library, **variables: str) -> None:
        python = Path(sys.executable)
        if library.folder:
            python = ROOT / library.folder / "bin" / "python"
            if not python.exists():
                raise Missing(f"there is no {library.folder}, which tools/bench/install makes")
        threads = str(cores())
        environment = {
            **{name: value for name, value in os.environ.items() if name not in _KEPT_PROGRAMS},
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "KERAS_BACKEND": library.backend,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TF_NUM_INTRAOP_THREADS": threads,
            "OMP_NUM_THREADS": threads,
            "NPROC": threads,  # JAX's
            **variables,
        }
        self._process = subprocess.Popen(
            [python, "-m", "tools.bench.worker", library.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BENCH_VERBOSE") else subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def __getattr__(self, request: str) -> Any:
        """A function that has the process do it, and waits for the answer."""
        return lambda *arguments: self._ask([request, arguments])

    def _ask(self, request):
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise Missing(f"its process ended, with code {self._process.wait()}") from None
        if "error" in answer:
            raise Missing(answer["error"])
        return answer["answer"]

    def ended(self) -> bool:
        """Returns whether the process has ended."""
        return self._process.poll() is not None

    def processor_seconds(self) -> float:
        """The time that all its threads have had, on Linux; elsewhere 0."""
        if sys.platform != "linux" or self.ended():
            return 0.0
        # The clock of another process, as clock_getcpuclockid(3) numbers it, which Python does not have.
        return time.clock_gettime((~self._process.pid << 3) | 2)

    def end(self) -> None:
        """Has the process end, which it does when there is nothing more to read."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()


class Workers:
    """A process for each library, started when it is first asked for and kept."""

    def __init__(self, libraries: dict[str, Library] = LIBRARIES) -> None:
        self.libraries = libraries
        self._there: dict[str, Worker] = {}

    def __getitem__(self, name: str) -> Worker:
        if name in self._there and self._there[name].ended():
            del self._there[name]
        if name not in self._there:
            self._there[name] = Worker(self.libraries[name])
        return self._there[name]

    def there(self) -> list[Worker]:
        """Those that run."""
        return [worker for worker in self._there.values() if not worker.ended()]

    def end(self) -> None:
        """Ends them all; the next request starts another."""
        for worker in self._there.values():
            worker.end()
        self._there.clear()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        self.end()


def cores() -> int:
    """The processors that this process, and so its children, may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
