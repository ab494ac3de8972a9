"""The digits of examples/, from three seeds."""

from tests.examples import scripts
from tests.tiers import whole


@whole
def test_label_smoothing_helps_accuracy_and_a_little_of_it_calibration(tmp_path):
    results = scripts.load("image_classification").main(tmp_path, seeds=3, epochs=30)
    for result in results:
        none, little, usual, calibrated = result.values()
        assert none["accuracy"] > 0.85  # one in ten by chance
        assert usual["accuracy"] > none["accuracy"]
        assert none["confidence"] > none["accuracy"] + 0.03
        assert usual["confidence"] < usual["accuracy"] - 0.05
        assert little["calibration error"] < 0.75 * min(none["calibration error"], usual["calibration error"])
        assert calibrated["accuracy"] == none["accuracy"]
        assert calibrated["calibration error"] < 0.75 * none["calibration error"]
        assert calibrated["cross-entropy"] < none["cross-entropy"] - 0.1
        assert little["cross-entropy"] < none["cross-entropy"] - 0.1
    assert (tmp_path / "confidence.png").read_bytes().startswith(b"\x89PNG")
