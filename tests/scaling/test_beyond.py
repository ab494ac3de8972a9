"""Policies, preferences, distillation and calibration: one device, replicas and divided classes give the same."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest

from tests.backend import BACKEND, environment
from tests.scaling import beyond_training, training
from tests.tiers import whole

# Each engine is a process of its own.
pytestmark = whole
ENGINES = ("MirroredStrategy, 2",) if BACKEND == "tensorflow" else ("DataParallel, 2", "ModelParallel, 2 x 2")


@functools.cache
def results(engine):
    """What was found on an engine."""
    command = [sys.executable, "-m", beyond_training.__name__, engine]
    processes = environment(CUDA_VISIBLE_DEVICES="-1", XLA_FLAGS=training.XLA_FLAGS)
    child = subprocess.run(command, env=processes, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("engine", ENGINES)
def test_they_are_those_of_one_device(engine):
    found, expected = results(engine), results("one device")
    # On replicas Keras' Distiller logs the mean of their shares of the loss, for its own losses too.
    shares = 2 if engine.startswith("Mirrored") else 1
    np.testing.assert_allclose(np.multiply(found["distillation"], shares), expected["distillation"], rtol=1e-6)
    for name in ("Policy", "Preference", "log_probs", "metrics"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
    for name in ("Policy", "Preference", "distillation"):
        assert expected[name][1] < expected[name][0]
    # As far as the temperature is computed.
    np.testing.assert_allclose(found["temperature"], expected["temperature"], rtol=1e-4)
    assert 0.01 < expected["temperature"] < 100
    for ours, theirs in zip(found["weights"], expected["weights"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-7)
