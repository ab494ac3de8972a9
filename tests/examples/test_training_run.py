"""The long run of examples/, killed and continued, at toy size."""

import csv
import json
import pathlib
import subprocess
import sys

import pytest

from tests.backend import environment
from tests.tiers import whole

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "training_run.py"


@whole
def test_a_killed_run_is_continued_on_the_same_curves(tmp_path):
    command = [sys.executable, SCRIPT, "--smoke", "--output", tmp_path / "run"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 steps in an epoch; killed after step 12 (return code -9)" in done.stdout

    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert [int(row["step"]) for row in rows if row["kind"] == "batches"] == list(range(1, 25))
    validations = list(map(json.loads, (tmp_path / "run" / "validations.jsonl").open()))
    # What the killed process had trained of the second epoch is trained again, to the same numbers.
    assert [row["step"] for row in validations] == [5, 10, 10, 15, 20]
    assert validations[2] == pytest.approx(validations[1], rel=1e-4)
    for row in validations:
        groups = [row["val_perplexity/statements"], row["val_perplexity/other topics"]]
        assert min(groups) < row["val_perplexity"] < max(groups)
    assert validations[-1]["val_perplexity"] < 0.7 * validations[0]["val_perplexity"]
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
