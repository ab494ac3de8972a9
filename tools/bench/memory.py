"""How high does the memory rise in a first step, above where it stands when the labels and logits are there?

Once for each peer, in a fresh process of its own, compilation included: `python -m tools.bench.memory ROW PEER`.
The gradient, which every peer returns, is part of it.
"""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf

from tools.bench import losses
from tools.bench.shapes import LANGUAGE_MODEL

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure(rounds: int) -> Iterator[dict]:
    """One record for each loss: the peak in MB, by peer. One sample each, whatever the number of rounds."""
    for row in losses.CLASSES:
        megabytes = {}
        for peer in losses.peers(row):
            command = [sys.executable, "-m", __name__, row, peer]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            megabytes[peer] = [json.loads(output)]
        about = {"shape": LANGUAGE_MODEL._asdict(), "dtype": "float32"}
        yield {"row": row, **about, "megabytes": megabytes}


def _peak(row, peer):
    labels, logits = map(tf.constant, _inputs(row))
    step = losses.peers(row)[peer]
    reset()
    start = highest()
    step(labels, logits)[1][-1, -1].numpy()
    return round((highest() - start) / 1e6)


def _inputs(row):
    """Made by NumPy: TensorFlow keeps memory that it has used to make data, and the step would find it there."""
    rng = np.random.default_rng(0)
    size = LANGUAGE_MODEL.rows, LANGUAGE_MODEL.classes
    logits = rng.standard_normal(size, "float32")
    if row == "sparse":
        return rng.integers(0, LANGUAGE_MODEL.classes, LANGUAGE_MODEL.rows, "int32"), logits
    labels = rng.integers(0, 2, size, "int8").astype("float32")
    if row == "dense":
        labels /= labels.sum(axis=1, keepdims=True)
    return labels, logits


def reset() -> None:
    """Sets the mark of the highest memory back to what is resident now, on Linux."""
    if RESET.exists():
        RESET.write_text("5")


def highest() -> int:
    """The peak of the resident memory. Off Linux it includes the making of the data, which can hide a small step."""
    if not STATUS.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss, which begins with the peak of the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", STATUS.read_text())[1])


if __name__ == "__main__":
    print(_peak(*sys.argv[1:]))
