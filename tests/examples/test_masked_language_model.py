"""The masked language model of examples/, every step of it at toy size."""

import pathlib
import re
import subprocess
import sys

from tests.backend import environment

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "masked_language_model.py"


def test_it_trains_and_a_step_takes_less_time_where_fewer_labels_count():
    done = subprocess.run([sys.executable, SCRIPT, "--smoke"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = dict(re.findall(r"^  (.*\S) +([\d.]+)$", done.stdout, re.MULTILINE))
    model, unigram, uniform = (
        float(figures[f"perplexity, {name}"])
        for name in ("this model", "unigram model of the training text", "every token equally likely")
    )
    assert 1 < model < uniform
    assert 1 < unigram < uniform
    assert 0 < float(figures["accuracy, this model"]) < 1
    assert f"val_perplexity: {model:.4f}" in done.stdout  # the last epoch
    times = re.findall(r"^ +(\d+)% of the labels count +(\d+) ms$", done.stdout, re.MULTILINE)
    assert [share for share, _ in times] == ["100", "50", "15"]
    all_count, half, few = (float(milliseconds) for _, milliseconds in times)
    assert all_count > half > few
