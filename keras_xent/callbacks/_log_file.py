"""A file of rows, CSV or a JSON object a line, that a run which is killed leaves readable."""

import csv
import itertools
import json
import math
import os
from collections.abc import Sequence
from typing import Any

_TEXTS, _INTEGERS = {"kind"}, {"epoch", "step", "iterations"}


class LogFile:
    """Rows of these columns in a file that ends in `.csv` or `.jsonl`."""

    def __init__(self, path: str, columns: Sequence[str]) -> None:
        self.path = path
        self._columns, self._is_csv = columns, path.endswith(".csv")
        self._header = ",".join(columns) + "\r\n"

    def begin(self, rows: list[dict[str, Any]]) -> None:
        """Writes the file anew with these rows. The file of another training is kept, under a name with a number."""
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        if not rows and os.path.exists(self.path) and self._lines() not in ([], [self._header]):
            os.replace(self.path, _free_name(self.path))
        # Under another name until it is whole.
        with open(f"{self.path}.part", "w", newline="", encoding="utf-8") as file:
            if self._is_csv:
                file.write(self._header)
            for row in rows:
                self._write(file, row)
        os.replace(f"{self.path}.part", self.path)

    def append(self, row: dict[str, Any]) -> None:
        """Writes a row at the end."""
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            self._write(file, row)

    def _write(self, file, row):
        if self._is_csv:
            csv.DictWriter(file, self._columns).writerow(row)
        else:
            # JSON has no word for infinite and for nan.
            file.write(
                json.dumps({name: value if _is_json(value) else str(value) for name, value in row.items()}) + "\n"
            )

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the file; none if there is no file or it holds something else."""
        if not os.path.exists(self.path):
            return []
        # A process that was killed may have left half a row.
        lines = [line for line in self._lines() if line.endswith("\n")]
        if self._is_csv and lines[:1] != [self._header]:
            return []
        try:
            rows = list(csv.DictReader(lines)) if self._is_csv else list(map(json.loads, lines))
            return [{name: _parsed(name, value) for name, value in row.items() if value != ""} for row in rows]
        except (AttributeError, TypeError, ValueError):
            # No log of this kind. It is kept, under another name.
            return []

    def _lines(self):
        with open(self.path, newline="", encoding="utf-8", errors="replace") as file:
            return file.readlines()


def _parsed(name, value):
    return value if name in _TEXTS else int(value) if name in _INTEGERS else float(value)


def _is_json(value):
    return isinstance(value, str) or math.isfinite(value)


def _free_name(path):
    stem, end = os.path.splitext(path)
    return next(name for i in itertools.count(1) if not os.path.exists(name := f"{stem}.{i}{end}"))
