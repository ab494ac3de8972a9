"""With the lines of docs/scaling.md a second process compiles nothing."""

import pathlib
import subprocess
import sys

import pytest

from tests.backend import environment

PROGRAM = """
import numpy as np
import keras_xent as kx
print(float(np.sum(kx.kernels.sparse_softmax_cross_entropy(np.zeros(4, "int32"), np.ones((4, 7), "float32")))))
"""


def files_in(folder):
    # JAX writes down when a program was last read.
    return {path.name for path in pathlib.Path(folder).rglob("*") if path.is_file() and "atime" not in path.name}


@pytest.mark.whole
def test_a_second_process_compiles_nothing(tmp_path):
    flags = f"--tf_xla_persistent_cache_directory={tmp_path}"
    variables = environment(
        TF_XLA_FLAGS=flags, JAX_COMPILATION_CACHE_DIR=str(tmp_path), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"
    )

    def run():
        command = [sys.executable, "-c", PROGRAM]
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout

    first, files = run(), files_in(tmp_path)
    assert files
    assert run() == first
    assert files_in(tmp_path) == files
