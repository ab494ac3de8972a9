"""One random call after the other."""

import pathlib
from collections.abc import Iterator

import numpy as np

from tests.backend import BACKEND, DTYPES, MODES
from tools.fuzzing import calls, checking, kernels, running

# One program in so many calls is a new one: it takes a second to compile, and a call of it milliseconds.
CALLS_OF_A_PROGRAM = 5
# Programs take memory.
MOST_PROGRAMS = 150


class Explorer:
    """Random calls of the kernels, counted; `step` tries one."""

    def __init__(self, seed: int, output: pathlib.Path, names: list[str] | None = None) -> None:
        self._rng = np.random.default_rng(seed)
        self._output = output
        self._names = names or list(kernels.KERNELS)
        self._seed = seed
        self._programs: dict[str, list[calls.Program]] = {name: [] for name in self._names}
        self.failures: list[pathlib.Path] = []
        self.by_kernel = dict.fromkeys(self._names, 0)
        self.calls = self.programs = 0
        self._failed: set[calls.Program] = set()

    @property
    def cases(self) -> int:
        """The number of cases that were tried."""
        return sum(self.by_kernel.values())

    def summary(self) -> str:
        """Returns the work done so far."""
        return (
            f"{self.cases:,} cases in {self.calls:,} calls of {self.programs:,} programs, {len(self.failures)} failures"
        )

    def step(self) -> Iterator[str]:
        """Tries one call; yields lines on what is wrong."""
        name = str(self._rng.choice(self._names))
        call = kernels.draw_call(self._rng, self._program(name))
        number, failures = checking.check(call, running.run)
        self.calls += 1
        self.by_kernel[name] += number
        if failures and call.program not in self._failed:
            self._failed.add(call.program)
            yield from self._saved(call, failures)

    def _program(self, name):
        known = self._programs[name]
        if known and self._rng.random() > 1 / CALLS_OF_A_PROGRAM:
            return known[self._rng.integers(len(known))]
        if sum(map(len, self._programs.values())) >= MOST_PROGRAMS:
            running.forget()
            for others in self._programs.values():
                others.clear()
        program = kernels.draw_program(self._rng, name, list(MODES), DTYPES)
        known.append(program)
        self.programs += 1
        return program

    def _saved(self, call, failures):
        what = failures[0].split(":")[0]
        small = checking.shrunk(call, lambda one: _fails_alike(one, what))
        _, now = checking.check(small, running.run)
        small, failures = (small, now) if now else (call, failures)
        self._output.mkdir(parents=True, exist_ok=True)
        path = self._output / f"{BACKEND}-{self._seed}-{len(self.failures)}.json"
        calls.save(small, path, failures, BACKEND)
        self.failures.append(path)
        yield f"{small}"
        yield from (f"  {failure}" for failure in failures)
        yield f"  tools/fuzz --replay {path}"


def _fails_alike(call, what):
    return any(failure.split(":")[0] == what for failure in checking.check(call, running.run)[1])
