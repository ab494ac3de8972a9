"""What a callback adds to a training step, each in a fresh process: `python -m tools.bench.callbacks CALLBACK STEPS`.

A small model, so that what is added is seen. The backend by KERAS_BACKEND.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

BATCH, LENGTH, FEATURES, CLASSES = 8, 64, 64, 2000
STEPS = 150
CALLBACKS = (
    "none",
    "Keras, every batch",
    "ours, every batch",
    "ours, every 50 batches",
    "ours, every epoch",
    "PerplexityLogger, every 50 batches",
)


def measure(rounds: int) -> Iterator[dict]:
    """One record for each backend: the milliseconds of a step, by callback; a sample for each process."""
    for backend in ("tensorflow", "jax"):
        times: dict[str, list[float]] = {name: [] for name in CALLBACKS}
        for turn in range(rounds):
            for name in (*CALLBACKS[turn % len(CALLBACKS) :], *CALLBACKS[: turn % len(CALLBACKS)]):
                times[name].append(_fresh(backend, name))
        shape = {"rows": BATCH * LENGTH, "classes": CLASSES}
        yield {"row": f"callbacks, {backend}", "shape": shape, "dtype": "float32", "milliseconds": times}


def _fresh(backend, *arguments):
    command = [sys.executable, "-m", "tools.bench.callbacks", *arguments]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    child = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(child.stdout.splitlines()[-1])


def _measure_here(name):
    import keras
    import numpy as np

    import keras_xent as kx

    model = keras.Sequential(
        [keras.Input((LENGTH,)), keras.layers.Embedding(CLASSES, FEATURES), kx.layers.LogitsDense(CLASSES)]
    )
    model.compile("adam", kx.losses.MaskedSequenceCrossentropy(), metrics=[kx.metrics.Perplexity()])
    x = np.random.default_rng(0).integers(0, CLASSES, (BATCH * STEPS, LENGTH))
    with tempfile.TemporaryDirectory() as folder:
        every = {"every batch": 1, "every 50 batches": 50, "every epoch": "epoch"}.get(name.partition(", ")[2])
        if name == "none":
            callbacks = []
        elif name.startswith("Keras"):
            callbacks = [keras.callbacks.TensorBoard(folder, update_freq=every)]
        elif name.startswith("ours"):
            callbacks = [kx.callbacks.TensorBoard(folder, update_freq=every)]
        else:
            callbacks = [kx.callbacks.PerplexityLogger(os.path.join(folder, "log.csv"), update_freq=every)]
        # Compiles the step, and opens the files.
        model.fit(x, x, BATCH, verbose=0, callbacks=callbacks)
        start = time.perf_counter()
        model.fit(x, x, BATCH, verbose=0, callbacks=callbacks)
        return 1e3 * (time.perf_counter() - start) / STEPS


if __name__ == "__main__":
    print(json.dumps(_measure_here(sys.argv[1])))
