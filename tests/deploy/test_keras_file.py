"""Files of Keras: those of earlier versions, training that goes on in another process, and the package forgotten."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest

from tests.backend import environment
from tests.deploy.golden import make
from tests.deploy.models import language_model, sequences


def in_fresh_process(program, *arguments, check=True):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=check)


@pytest.mark.whole
def test_a_file_of_an_earlier_version_loads_and_trains_on():
    """It holds every loss, layer and metric, and was saved by Keras 3.12 on TensorFlow 2.18."""
    expected = json.loads((make.HERE / "numbers.json").read_text())
    found = make.numbers(keras.models.load_model(make.HERE / "model.keras"))
    assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-6)
    assert found["steps"] == pytest.approx(expected["steps"], rel=1e-6)


TRAINS_ON = """
import sys
import keras, numpy as np
import keras_xent
from tests.deploy.models import sequences

model = keras.models.load_model(sys.argv[1])
tokens = sequences(8, 10)
model.fit(tokens[:, :-1], tokens[:, 1:], epochs=2, shuffle=False, verbose=0)
np.savez(sys.argv[2], *model.get_weights())
"""


@pytest.mark.whole
def test_training_goes_on_bit_for_bit_in_a_fresh_process(tmp_path):
    """Without dropout: with any loss, Keras does not save how far its random numbers are."""
    model, tokens = language_model(rate=0.0), sequences(8, 10)
    model.fit(tokens[:, :-1], tokens[:, 1:], epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    model.fit(tokens[:, :-1], tokens[:, 1:], epochs=2, shuffle=False, verbose=0)
    in_fresh_process(TRAINS_ON, tmp_path / "model.keras", tmp_path / "weights.npz")
    with np.load(tmp_path / "weights.npz") as weights:
        for ours, theirs in zip(model.get_weights(), weights.values(), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.whole
def test_without_the_package_the_error_names_it():
    program = "import sys, keras; keras.models.load_model(sys.argv[1])"
    child = in_fresh_process(program, make.HERE / "model.keras", check=False)
    assert child.returncode == 1
    assert "make sure they are all imported" in child.stderr
    assert "'registered_name': 'keras_xent>" in child.stderr
