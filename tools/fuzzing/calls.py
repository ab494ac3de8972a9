"""A call of a kernel, and the file that holds one."""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Program:
    """A program: a kernel with its options, in a mode, for a shape and a dtype."""

    kernel: str
    mode: str
    dtype: str
    # The shape of the logits; [tokens, features, classes] for linear kernels, or groups in place of tokens.
    shape: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()
    # Which arrays are given, beside those that the kernel needs.
    given: frozenset[str] = frozenset()

    def get(self, option: str, default: Any = None) -> Any:
        """The value of an option."""
        return dict(self.options).get(option, default)


@dataclass
class Call:
    """A program and its arrays. Those of the program's dtype hold numbers that this dtype has."""

    program: Program
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def __str__(self) -> str:
        p = self.program
        options = ", ".join(f"{name}={value!r}" for name, value in p.options)
        return f"{p.kernel}({options}) of {p.dtype} {list(p.shape)} in mode {p.mode}, with {', '.join(self.arrays)}"


def save(call: Call, path: Any, failures: list[str], backend: str) -> None:
    """Writes the call to a file, with what was wrong."""
    p = call.program
    arrays = {
        n: {"dtype": str(a.dtype), "shape": a.shape, "values": a.ravel().tolist()} for n, a in call.arrays.items()
    }
    text = {
        "failures": failures,
        "backend": backend,
        "kernel": p.kernel,
        "mode": p.mode,
        "dtype": p.dtype,
        "shape": p.shape,
        "options": dict(p.options),
        "given": sorted(p.given),
        "arrays": arrays,
    }
    path.write_text(json.dumps(text, indent=1) + "\n")


def load(path: Any) -> tuple[Call, str]:
    """The call of a file, and the backend that it failed on."""
    text = json.loads(path.read_text())
    options = tuple((n, tuple(v) if isinstance(v, list) else v) for n, v in text["options"].items())
    names = ("kernel", "mode", "dtype")
    program = Program(
        **{name: text[name] for name in names},
        shape=tuple(text["shape"]),
        options=options,
        given=frozenset(text["given"]),
    )
    arrays = {n: np.array(a["values"], a["dtype"]).reshape(a["shape"]) for n, a in text["arrays"].items()}
    return Call(program, arrays), text["backend"]
