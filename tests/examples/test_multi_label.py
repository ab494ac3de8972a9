"""The labels with gaps of examples/, from three seeds."""

from tests.examples import scripts
from tests.tiers import whole


@whole
def test_missing_labels_are_left_out_and_not_taken_for_no():
    for result in scripts.load("multi_label").main(seeds=3, epochs=10, size=4000):
        left_out, taken_for_no, everything = (row["mean F1"] for row in result.values())
        assert taken_for_no < 0.2
        assert 0.75 < left_out < everything
