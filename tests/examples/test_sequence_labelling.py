"""The code in colors of examples/, from three seeds."""

import numpy as np
import pytest

from tests.examples import scripts
from tests.tiers import whole


@pytest.fixture(scope="module")
def script():
    return scripts.load("sequence_labelling")


def test_a_character_has_the_class_of_its_token(script):
    codes, labels = script.read_lines("queue")
    line = "    from _queue import SimpleQueue"
    row = next(i for i, code in enumerate(codes) if "".join(map(chr, code)).rstrip("\0") == line)
    blank, keyword, name = -1, script.CLASSES.index("keyword"), script.CLASSES.index("name")
    words = np.repeat([blank, keyword, blank, name, blank, keyword, blank, name], [4, 4, 1, 6, 1, 6, 1, 11])
    np.testing.assert_array_equal(labels[row, : len(line)], words)
    assert (labels[row, len(line) :] == script.IGNORED).all()


@whole
def test_it_knows_more_of_a_character_than_the_character_tells(script, tmp_path):
    baseline, results = script.main(tmp_path, seeds=3, every=2, epochs=6)
    assert 0.4 < baseline < 0.65
    for result in results:
        assert result["token_accuracy"] > 0.9
        assert result["perplexity"] < 1.4
    assert (tmp_path / "code.png").read_bytes().startswith(b"\x89PNG")
