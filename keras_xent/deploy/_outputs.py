"""Output files of a command, which must not be its input files."""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def check_outputs(outputs: dict[str, Any], files: Iterable[Any], folder: Any) -> None:
    """Refuses to write over a file that is read, by whatever name, into a folder that is read, or twice to one file.

    `outputs` are paths by the option that names them.
    """
    for option, path in outputs.items():
        in_folder = Path(path).resolve().is_relative_to(Path(folder).resolve())
        if in_folder or any(_is_same_file(path, file) for file in files):
            raise ValueError(f"{option} would overwrite '{path}', which is read. Write to another file.")
    for (one, first), (other, second) in itertools.combinations(outputs.items(), 2):
        if _is_same_file(first, second):
            raise ValueError(f"{one} and {other} would both write '{second}'. Write to two files.")


def _is_same_file(one, other):
    one, other = Path(one), Path(other)
    if not (one.exists() and other.exists()):
        return one.resolve() == other.resolve()
    # Devices such as /dev/null may be read and written.
    return one.is_file() and one.samefile(other)


def opened(path: Any, stack: contextlib.ExitStack) -> Any:
    """The file, opened for writing until the stack is left; None for None."""
    # The name of a scored file may hold bytes that are not UTF-8.
    return path and stack.enter_context(open(path, "w", encoding="utf-8", errors="replace"))


def discard_standard_output() -> None:
    """Discards buffered output: Python would write it again at exit, and fail with a traceback."""
    # A stream that is not a file has no descriptor.
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
