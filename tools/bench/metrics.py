"""What metrics add to a training step with a fused head: `python -m tools.bench.metrics ROUNDS`.

All models in one process and in turn, since processes differ by more than metrics cost. The backend by KERAS_BACKEND.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

BATCH, LENGTH, FEATURES, CLASSES = 8, 512, 256, 32_000
WARM_UP = 2


def measure(rounds: int) -> Iterator[dict]:
    """One record for each backend: the milliseconds of a step, by what the model was compiled with."""
    for backend in ("tensorflow", "jax"):
        command = [sys.executable, "-m", "tools.bench.metrics", str(rounds)]
        environment = {**os.environ, "KERAS_BACKEND": backend}
        child = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        shape = {"rows": BATCH * LENGTH, "classes": CLASSES}
        times = json.loads(child.stdout.splitlines()[-1])
        yield {"row": f"metrics, {backend}", "shape": shape, "dtype": "float32", "milliseconds": times}


def _measure_here(rounds):
    import keras
    import numpy as np

    import keras_xent as kx

    tokens = np.random.default_rng(0).integers(0, CLASSES, (BATCH, LENGTH))

    def step(metrics):
        model = keras.Sequential(
            [keras.Input((LENGTH,)), keras.layers.Embedding(CLASSES, FEATURES), kx.layers.LogitsDense(CLASSES)]
        )
        model.compile("sgd", kx.losses.MaskedSequenceCrossentropy(), metrics=metrics)
        call = lambda: float(model.train_on_batch(tokens, tokens, return_dict=True)["loss"])  # noqa: E731
        # Compiled at once: the loss ranks labels for any metric that is alive when it is compiled.
        call()
        return call

    steps = {
        "no metric": step([]),
        "Perplexity": step([kx.metrics.Perplexity()]),
        "and TokenAccuracy": step([kx.metrics.Perplexity(), kx.metrics.TokenAccuracy()]),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(-WARM_UP, rounds):
        names = names[1:] + names[:1]
        for name in names:
            start = time.perf_counter()
            steps[name]()
            if turn >= 0:
                times[name].append(round(1e3 * (time.perf_counter() - start), 1))
    return times


if __name__ == "__main__":
    print(json.dumps(_measure_here(int(sys.argv[1]))))
