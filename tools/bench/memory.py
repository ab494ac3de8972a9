"""How high does the memory rise in a first step, above where it stands when the labels and logits are there?

Once for each peer, in a fresh process of its own, compilation included: `python -m tools.bench.memory ROW PEER`.
The gradient, which every peer returns, is part of it.
"""

import json
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from tools.bench import losses, peak
from tools.bench.shapes import LANGUAGE_MODEL


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
    peak.reset()
    start = peak.highest()
    step(labels, logits)[1][-1, -1].numpy()
    return round((peak.highest() - start) / 1e6)


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


if __name__ == "__main__":
    print(_peak(*sys.argv[1:]))
