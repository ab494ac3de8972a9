"""The masked language model of examples/, every step of it at toy size."""

import pathlib
import re
import subprocess
import sys

import pytest

from tests.backend import environment
from tests.tiers import whole

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "masked_language_model.py"


def printed_by(*options):
    done = subprocess.run([sys.executable, SCRIPT, *options], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, dict(re.findall(r"^  (.*\S) +([\d.]+)$", done.stdout, re.MULTILINE))


@whole
@pytest.mark.parametrize("seed", range(3))
def test_whole_it_beats_the_unigram_model_by_a_quarter(seed):
    _, figures = printed_by("--seed", str(seed))
    unigram = float(figures["perplexity, unigram model of the training text"])
    assert float(figures["perplexity, this model"]) < 0.75 * unigram


@whole
def test_it_trains_and_a_step_takes_less_time_where_fewer_labels_count():
    printed, figures = printed_by("--smoke")
    model, unigram, uniform = (
        float(figures[f"perplexity, {name}"])
        for name in ("this model", "unigram model of the training text", "every token equally likely")
    )
    assert 1 < model < uniform
    assert 1 < unigram < uniform
    assert 0 < float(figures["accuracy, this model"]) < 1
    assert f"val_perplexity: {model:.4f}" in printed  # the last epoch
    # What else the machine does in these milliseconds is not the example's.
    assert falls(printed) or falls(printed_by("--smoke")[0]) or falls(printed_by("--smoke")[0])


def falls(printed):
    """Whether the step takes less time where fewer labels are valid."""
    times = re.findall(r"^ +(\d+)% of the labels valid +(\d+) ms$", printed, re.MULTILINE)
    assert [share for share, _ in times] == ["100", "50", "15"]
    all_count, half, few = (float(milliseconds) for _, milliseconds in times)
    return all_count > half > few
