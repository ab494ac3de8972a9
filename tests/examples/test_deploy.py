"""The example of deployment, every step of it at toy size."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from tests.backend import environment
from tests.tiers import whole

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "deploy.py"


@whole
def test_a_process_without_keras_and_litert_score_what_keras_evaluates(tmp_path):
    command = [sys.executable, SCRIPT, "--smoke", "--output", tmp_path]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^  (?:evaluated by|scored in) (.*\S) +([\d.]+)$", done.stdout, re.MULTILINE)
    assert [place for place, _ in rows] == ["Keras", "the fresh process", "LiteRT"]
    trained = json.loads((tmp_path / "history.json").read_text())["val_perplexity"][-1]
    assert [float(figure) for _, figure in rows] == pytest.approx([trained] * 3, rel=1e-4)
    assert (tmp_path / "scorer" / "assets.extra" / "tokenizer.json").exists()
