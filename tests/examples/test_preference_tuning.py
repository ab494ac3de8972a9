"""The preference tuning of examples/, at toy size."""

import sys

from tests.examples import scripts
from tests.tiers import whole


@whole
def test_the_accuracy_on_held_out_pairs_rises(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(scripts.EXAMPLES)])
    before, *_, after = scripts.load("preference_tuning").main(tmp_path, smoke=True)
    assert before < 0.5
    assert after > before + 0.05
    assert (tmp_path / "preference.png").exists()
