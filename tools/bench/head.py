"""Forward and backward of the fused head against PyTorch's, and against the logits made, each in a fresh process.

`python -m tools.bench.head PEER TOKENS FEATURES CLASSES SHARE` measures one. PyTorch has an environment of its own.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tools.bench import peak

TORCH = Path(".venv-torch/bin/python")
HOW_TO_GET_IT = "python3 -m venv .venv-torch && .venv-torch/bin/pip install torch==2.13.0 numpy"
PEERS = ("ours, TensorFlow", "ours, JAX", "logits, Keras, XLA", "PyTorch", "PyTorch, chunked")
# Tokens, features, classes, share of valid labels; the last has the head of Gemma 2 (arXiv:2408.00118, table 1).
WORKS = ((8192, 256, 32_000, 1.0), (8192, 256, 32_000, 0.15), (2048, 2304, 256_000, 1.0))


def measure(rounds: int) -> Iterator[dict]:
    """Two records for each work: milliseconds and megabytes by peer."""
    for work in WORKS:
        large = work[2] > 100_000
        # The logits of the largest, their gradient and what lies between them need 8 GB and more.
        peers = [peer for peer in PEERS if not (large and peer == "logits, Keras, XLA")]
        found: dict[str, list] = {peer: [] for peer in peers}
        for turn in range(1 if large else min(rounds, 3)):
            for peer in peers[turn:] + peers[:turn]:
                found[peer].append(_fresh(peer, *map(str, work)))
        tokens, features, classes, share = work
        row = f"head, D {features}, {share:.0%} valid"
        about = {"row": row, "shape": {"rows": tokens, "classes": classes}, "dtype": "float32"}
        for unit in "milliseconds", "megabytes":
            yield {**about, unit: {peer: [one[unit] for one in all if one] for peer, all in found.items() if all[0]}}


def _fresh(peer, *arguments):
    torch = peer.startswith("PyTorch")
    if torch and not TORCH.exists():
        print(f"{peer}: not measured, since there is no {TORCH}. Make it: {HOW_TO_GET_IT}", file=sys.stderr)
        return None
    environment = {**os.environ, "KERAS_BACKEND": "jax" if peer.endswith("JAX") else "tensorflow"}
    python = str(TORCH) if torch else sys.executable
    command = [python, "-m", "tools.bench.head", peer, *arguments]
    child = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(child.stdout.splitlines()[-1])


def _measure_here(peer, tokens, features, classes, share):
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((tokens, features), "float32")
    kernel = 0.1 * rng.standard_normal((features, classes), "float32")
    labels = np.where(rng.uniform(size=tokens) < share, rng.integers(0, classes, tokens), -100)
    maker = _torch_step if peer.startswith("PyTorch") else _jax_step if peer.endswith("JAX") else _tensorflow_step
    step = maker(peer, hidden, kernel, labels)
    # What is there before: the inputs. The highest mark is that of the kernel and of what the steps add.
    del hidden, kernel
    gc.collect()
    peak.reset()
    start = peak.highest()
    times = []
    for _ in range(2 if classes > 100_000 else 6):
        begin = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - begin)
    milliseconds = round(1e3 * sorted(times[1:])[len(times[1:]) // 2], 1)
    return {"milliseconds": milliseconds, "megabytes": round((peak.highest() - start) / 1e6), "loss": loss}


def _tensorflow_step(peer, hidden, kernel, labels) -> Callable[[], float]:
    import keras
    import tensorflow as tf

    import keras_xent

    hidden, kernel, labels = tf.Variable(hidden), tf.Variable(kernel), tf.constant(labels)
    ours = peer.startswith("ours")
    theirs = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100)

    @tf.function(autograph=False, jit_compile=None if ours else True)
    def step():
        with tf.GradientTape() as tape:
            if ours:
                loss = keras_xent.kernels.linear_cross_entropy(
                    hidden, kernel, labels, ignore_class=-100, reduction="token_mean"
                )
            else:
                loss = theirs(labels, hidden @ kernel)
        return loss, tape.gradient(loss, [hidden, kernel])

    def run():
        loss, gradients = step()
        gradients[1][0, 0].numpy()
        return float(loss)

    return run


def _jax_step(peer, hidden, kernel, labels) -> Callable[[], float]:
    import jax

    import keras_xent

    hidden, kernel, labels = jax.block_until_ready([jax.numpy.array(a) for a in (hidden, kernel, labels)])

    @jax.jit
    def step(hidden, kernel):
        def loss(hidden, kernel):
            linear = keras_xent.kernels.linear_cross_entropy
            return linear(hidden, kernel, labels, ignore_class=-100, reduction="token_mean")

        return jax.value_and_grad(loss, (0, 1))(hidden, kernel)

    def run():
        loss, gradients = step(hidden, kernel)
        jax.block_until_ready(gradients)
        return float(loss)

    return run


def _torch_step(peer, hidden, kernel, labels) -> Callable[[], float]:
    import torch

    hidden, labels = torch.tensor(hidden, requires_grad=True), torch.tensor(labels)
    # PyTorch's weights are [classes, features].
    weight = torch.tensor(kernel.T.copy(), requires_grad=True)
    options = torch.nn.LinearCrossEntropyOptions() if peer.endswith("chunked") else None

    def run():
        hidden.grad = weight.grad = None
        loss = torch.nn.functional.linear_cross_entropy(hidden, weight, labels, ignore_index=-100, options=options)
        loss.backward()
        return float(loss)

    return run


if __name__ == "__main__":
    print(json.dumps(_measure_here(sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5]))))
