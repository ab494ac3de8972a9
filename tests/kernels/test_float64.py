"""JAX has float64 under JAX_ENABLE_X64=1 alone, so that a process of its own computes in it."""

import pathlib
import subprocess
import sys

import pytest

from tests.backend import BACKEND, environment
from tests.tiers import whole

KERNELS = pathlib.Path(__file__).parent


@whole
@pytest.mark.skipif(BACKEND != "jax", reason="TensorFlow's float64 is tested with its other dtypes")
def test_jax_computes_float64_in_float64():
    files = [str(KERNELS / "test_softmax_agreement.py"), str(KERNELS / "test_linear_agreement.py")]
    command = [sys.executable, "-m", "pytest", "-q", "--whole", *files, "-k", "float64 or and_gradients_agree"]
    done = subprocess.run(
        command, env=environment(JAX_ENABLE_X64="1"), cwd=KERNELS.parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]
