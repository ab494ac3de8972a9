"""The large vocabulary of examples/, on batches of which the logits fit."""

import pathlib
import re
import subprocess
import sys

import pytest

from tests.backend import environment
from tests.tiers import whole

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "large_vocabulary.py"


@whole
def test_it_trains_as_with_logits_and_needs_a_fraction_of_their_memory(tmp_path):
    command = [sys.executable, SCRIPT, "--smoke", "--output", tmp_path]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits = float(re.search(r"^The logits of a batch: ([\d.]+) GB", done.stdout, re.MULTILINE)[1])
    rows = re.findall(r"^  (.*\S) +([\d.]+) GB   loss of the last epoch ([\d.]+)$", done.stdout, re.MULTILINE)
    (_, ours, our_loss), (_, theirs, their_loss) = rows
    assert float(our_loss) == pytest.approx(float(their_loss), abs=1e-3)
    assert float(theirs) - float(ours) > 0.5 * logits
    assert re.search(r"^Validation perplexity [\d,]+; every token equally likely 131,072\.$", done.stdout, re.MULTILINE)
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
