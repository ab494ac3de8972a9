"""Several processes that train one model: examples/multi_process.py, undisturbed and with one of them killed."""

import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from tests.backend import BACKEND, environment
from tests.tiers import whole

pytestmark = pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution is for JAX")
SCRIPT = Path(__file__).parents[2] / "examples" / "multi_process.py"
EPOCHS = 6


def started(folder, output, **streams):
    """Two processes of one training; the first writes what it has trained."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-u", SCRIPT, "--smoke", "--epochs", EPOCHS, "--processes", 2, "--address", address]
    command += ["--backup", folder, "--output", output]
    return [
        subprocess.Popen([*map(str, command), "--process", str(i)], env=environment(), text=True, **streams)
        for i in (0, 1)
    ]


def finished(folder, output):
    """What a run of both processes has trained."""
    with tempfile.TemporaryFile("w+") as said:
        children = started(folder, output, stdout=said, stderr=subprocess.STDOUT)
        try:
            codes = [child.wait(timeout=200) for child in children]
        finally:
            for child in children:
                child.kill()
            said.seek(0)
            print(said.read())  # pytest shows it where the test fails
    assert codes == [0, 0]
    return dict(np.load(output))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return finished(folder / "backup", folder / "trained.npz")


@whole
def test_two_processes_train_as_one_does():
    command = [sys.executable, SCRIPT, "--smoke", "--epochs", "2"]
    child = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    uneven = [int(n) for n in re.findall(r"^process \d of 2: (\d+) tokens", child.stdout, re.MULTILINE)]
    assert max(uneven) > 2 * min(uneven), child.stdout
    apart = re.search(r"difference: loss (\S+), perplexity (\S+), weights (\S+)$", child.stdout, re.MULTILINE)
    assert all(float(one) < 1e-5 for one in apart.groups()), child.stdout


@whole
@pytest.mark.parametrize("killed", [0, 1], ids=["the first", "the second"])
def test_where_one_is_killed_the_other_ends_and_both_go_on_where_they_were(killed, undisturbed, tmp_path):
    backup, output = tmp_path / "backup", tmp_path / "trained.npz"
    children = started(backup, output, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in children[0].stdout:
        if line.startswith("Epoch 4/"):
            break
    children[killed].kill()
    start = time.monotonic()
    children[1 - killed].communicate(timeout=120)
    assert children[1 - killed].returncode != 0
    assert time.monotonic() - start < 60
    assert not output.exists()
    children[killed].communicate()

    resumed = finished(backup, output)
    assert len(resumed["loss"]) < EPOCHS
    for name, value in undisturbed.items():
        if name.isdigit():
            np.testing.assert_allclose(resumed[name], value, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_allclose(resumed[name], value[-len(resumed[name]) :], rtol=1e-5)
