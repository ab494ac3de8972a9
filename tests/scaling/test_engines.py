"""The same data give the same model on one device, on replicas, and on a mesh of devices."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.backend import BACKEND, environment
from tests.scaling import training
from tests.tiers import whole

# Each engine is a process of its own, or several.
pytestmark = whole
ENGINES = (
    ("MirroredStrategy, 2", "MirroredStrategy, 4")
    if BACKEND == "tensorflow"
    else ("DataParallel, 2", "DataParallel, 4", "ModelParallel, 1 x 2", "ModelParallel, 2 x 2")
)
CASES = [(engine, case) for engine in ENGINES for case in training.CASES]


@pytest.fixture(scope="module")
def results(request):
    """What was trained, by engine and case; the cases of an engine run in one process of its own."""
    known = {}
    tests = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and "case" in item.fixturenames
    ]
    chosen = {(test["engine"], test["case"]) for test in tests}
    # What the other engines are compared with.
    chosen |= {("one device", case) for _, case in chosen} | {("one device", exact_of(case)) for _, case in chosen}

    def of(engine, case):
        found = known.setdefault(engine, {})
        if case not in found:
            cases = [name for name in training.CASES if name == case or (engine, name) in chosen]
            command = [sys.executable, "-m", training.__name__, engine, *cases]
            processes = environment(CUDA_VISIBLE_DEVICES="-1", XLA_FLAGS=training.XLA_FLAGS)
            child = subprocess.run(command, env=processes, capture_output=True, text=True)
            assert child.returncode == 0, child.stderr
            found.update(json.loads(child.stdout.splitlines()[-1]))
        return found[case]

    return of


def exact_of(case):
    """The case in float32."""
    return case.replace("bfloat16", "all options")


def distances(ours, theirs, leave_out=()):
    """The largest difference of a weight, and the largest relative one of what was logged."""
    weights = max(np.abs(np.subtract(a, b)).max() for a, b in zip(ours["weights"], theirs["weights"], strict=True))
    logged = [[*one["history"].items(), *one["evaluated"].items()] for one in (ours, theirs)]
    pairs = [(a, b) for (name, a), (_, b) in zip(*logged, strict=True) if name not in leave_out]
    return weights, max((np.abs(np.subtract(a, b)) / np.maximum(np.abs(b), 1e-9)).max() for a, b in pairs)


@pytest.mark.parametrize("engine, case", CASES)
def test_it_trains_as_one_device_does(results, engine, case):
    """Replicas with 12, 2 and 0 valid tokens: loss, metrics and weights after two epochs."""
    allowed = 1e-5, 1e-5
    if "bfloat16" in case:
        # No farther from one device than bfloat16 is from float32 there; logged, no farther than one of its roundings.
        allowed = distances(results("one device", case), results("one device", exact_of(case)))[0], 2**-8
    # Padding adds rows to the last batch, by which Keras weighs its loss. The metrics do not count them.
    leave_out = {"loss"} if "last batch" in case and BACKEND == "jax" else ()
    weights, logged = distances(results(engine, case), results("one device", case), leave_out)
    assert weights <= allowed[0]
    assert logged <= allowed[1]


if BACKEND == "jax":

    def test_the_classes_of_the_heads_lie_on_several_devices(results):
        spread = {
            case: {path.split("/", 1)[1]: count for path, count in found["shards"].items() if count > 1}
            for case in ("fused, all options", "tied")
            for found in [results("ModelParallel, 2 x 2", case)]
        }
        assert spread["fused, all options"] == {"kernel": 2, "bias": 2}
        assert spread["tied"] == {"embeddings": 2}
