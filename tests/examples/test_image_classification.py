"""The digits of examples/: from one seed, or with `--whole` from three."""

from tests.examples import scripts


def test_label_smoothing_helps_accuracy_and_a_little_of_it_calibration(tmp_path, request):
    whole = request.config.getoption("--whole")
    results = scripts.load("image_classification").main(tmp_path, seeds=3 if whole else 1, epochs=30)
    for result in results:
        none, little, usual = result.values()
        assert none["accuracy"] > 0.85  # one in ten by chance
        assert usual["accuracy"] > none["accuracy"]
        assert none["confidence"] > none["accuracy"] + 0.03
        assert usual["confidence"] < usual["accuracy"] - 0.05
        assert little["calibration error"] < 0.75 * min(none["calibration error"], usual["calibration error"])
        assert little["cross-entropy"] < none["cross-entropy"] - 0.1
    assert (tmp_path / "confidence.png").read_bytes().startswith(b"\x89PNG")
