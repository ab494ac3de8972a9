"""The labels with gaps of examples/: from one seed, or with `--whole` from three."""

from tests.examples import scripts


def test_missing_labels_are_left_out_and_not_taken_for_no(request):
    whole = request.config.getoption("--whole")
    for result in scripts.load("multi_label").main(seeds=3 if whole else 1, epochs=10, size=4000):
        left_out, taken_for_no, everything = (row["mean F1"] for row in result.values())
        assert taken_for_no < 0.2
        assert 0.75 < left_out < everything
