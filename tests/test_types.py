"""A user's script is checked against the types of the package, which `py.typed` promises."""

import subprocess
import sys

import pytest

pytest.importorskip("mypy")

SCRIPT = """
import keras_xent as kx

right = kx.losses.SparseCategoricalCrossentropy(reduction="token_mean", ignore_class=-1)
distillation = kx.losses.Distillation(divergence="reverse_kl")
detector = kx.callbacks.SpikeDetector(stop="non_finite")
kx.losses.SparseCategoricalCrossentropy(reduction="avg")  # wrong
kx.kernels.linear_cross_entropy([[1.0]], [[1.0]], [0], reduction="avg")  # wrong
kx.losses.Distillation(divergence="kl")  # wrong
kx.losses.binary_crossentropy([1], [0.5], axis="last")  # wrong
kx.callbacks.SpikeDetector(stop="spikes")  # wrong
"""


@pytest.mark.whole
def test_a_name_that_does_not_exist_is_found_by_a_type_checker(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--follow-imports=silent", str(script)]
    child = subprocess.run(command, capture_output=True, text=True)
    errors = [line for line in child.stdout.splitlines() if "error:" in line]
    assert len(errors) == SCRIPT.count("# wrong") and all("[arg-type]" in error for error in errors), child.stdout
