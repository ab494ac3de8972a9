"""The example of the ways to sum up batches, and that the page has its figures."""

import pathlib
import re
import subprocess
import sys

import pytest

from tests.backend import environment
from tests.tiers import whole

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = whole


@pytest.fixture(scope="module")
def figures():
    """What the script prints, by name."""
    script = ROOT / "examples" / "perplexity.py"
    printed = subprocess.run(
        [sys.executable, script, "--smoke"], env=environment(), capture_output=True, text=True, check=True
    ).stdout
    return dict(re.findall(r"^  (\S.*\S) +([\d.]+)$", printed, re.MULTILINE))


def test_the_metric_alone_is_the_perplexity(figures):
    right = figures["exp(sum of nats / number of tokens)"]
    assert figures["keras_xent.metrics.Perplexity"] == figures["2 to the bits"] == right
    others = ("exp of the reported loss, a mean over batches", "mean of the batches' perplexities")
    assert all(float(figures[name]) > 1.5 * float(right) for name in others)
    assert float(figures["exp of Keras' loss, padding by sample weights"]) < 0.5 * float(right)
    assert figures["keras_xent.metrics.BitsPerByte"] == figures["bits per byte, 77 bytes"]


def test_the_page_has_these_figures(figures):
    page = (ROOT / "docs" / "perplexity.md").read_text()
    names = [name for name in figures if "byte" not in name.lower()]
    assert len(names) == 8
    for name in names:
        assert figures[name] in page, name
