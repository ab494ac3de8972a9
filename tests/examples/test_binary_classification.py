"""The binary classification of examples/, from three seeds."""

import pytest

from tests.examples import scripts
from tests.tiers import whole


@whole
def test_pos_weight_finds_more_and_its_correction_makes_the_probabilities_true(tmp_path):
    results = scripts.load("binary_classification").main(tmp_path, seeds=3, epochs=40)
    for result in results:
        plain, weighted, corrected = result.values()
        assert weighted["found"] > plain["found"] + 0.3
        assert weighted["calibration error"] > 0.15
        assert corrected["calibration error"] < 0.08
        assert corrected["found"] == pytest.approx(weighted["found"], abs=0.03)
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
