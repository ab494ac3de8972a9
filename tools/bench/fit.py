"""Step time and peak memory of `fit` with a large vocabulary: a Dense layer and Keras' loss, or a head that is fused.

Each peer in a fresh process: `python -m tools.bench.fit PEER SHARE JIT`, the backend by KERAS_BACKEND.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

BATCH, LENGTH, FEATURES, CLASSES = 16, 512, 256, 32_000
STEPS = 6
PEERS = ("ours", "ours, metrics", "Keras")


def measure(rounds: int) -> Iterator[dict]:
    """One record for each backend, mode and share of valid labels."""
    for backend, jit, share in (
        ("tensorflow", "auto", 1.0),
        ("tensorflow", "auto", 0.15),
        ("tensorflow", "jit", 1.0),
        ("jax", "auto", 1.0),
        ("jax", "auto", 0.15),
    ):
        found = {peer: _fresh(backend, peer, str(share), jit) for peer in PEERS}
        mode = {"tensorflow": "graph" if jit == "auto" else "XLA", "jax": "JAX"}[backend]
        row = f"fit, {mode}, {share:.0%} valid"
        about = {"row": row, "shape": {"rows": BATCH * LENGTH, "classes": CLASSES}, "dtype": "float32"}
        yield {**about, "milliseconds": {peer: one["milliseconds"] for peer, one in found.items()}}
        yield {**about, "megabytes": {peer: [one["megabytes"]] for peer, one in found.items()}}


def _fresh(backend, *arguments):
    command = [sys.executable, "-m", "tools.bench.fit", *arguments]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    child = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(child.stdout.splitlines()[-1])


def _measure_here(peer, share, jit):
    import keras
    import numpy as np

    import keras_xent
    from tools.bench import peak

    ours = peer != "Keras"
    tokens = keras.Input((LENGTH,), dtype="int32")
    hidden = keras.layers.Dense(FEATURES, activation="gelu")(keras.layers.Embedding(CLASSES, FEATURES)(tokens))
    head = keras_xent.layers.LogitsDense if ours else keras.layers.Dense
    model = keras.Model(tokens, head(CLASSES)(hidden))
    metrics = []
    if peer == "ours, metrics":
        # Made only here: one that is alive has the losses count hits.
        metrics = [keras_xent.metrics.Perplexity(ignore_class=-1), keras_xent.metrics.TokenAccuracy(ignore_class=-1)]
    if ours:
        loss = keras_xent.losses.MaskedSequenceCrossentropy(ignore_class=-1)
    else:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    jit_compile = True if jit == "jit" else "auto"
    model.compile("adam", loss, metrics=metrics, jit_compile=jit_compile)
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, CLASSES, (2, BATCH * STEPS, LENGTH), "int32")
    y = np.where(rng.uniform(size=y.shape) < share, y, -1).astype("int32")

    class Clock(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.start = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            float(logs["loss"])  # waits for the step
            times.append(round(1e3 * (time.perf_counter() - self.start), 1))

    times: list[float] = []
    peak.reset()
    start = peak.highest()
    model.fit(x, y, BATCH, verbose=0, callbacks=[Clock()], shuffle=False)
    return {"milliseconds": times[1:], "megabytes": round((peak.highest() - start) / 1e6)}


if __name__ == "__main__":
    print(json.dumps(_measure_here(sys.argv[1], float(sys.argv[2]), sys.argv[3])))
