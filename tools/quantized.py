"""Memory and time of a step through an int8 head: the table of docs/large-vocabularies.md.

    python tools/quantized.py

Each row is a process of its own: loss and gradient for the hidden states, the best of three steps.
"""

import resource
import subprocess
import sys
import time

SIZES = ((4096, 256, 32_000), (8192, 256, 32_000))
HEADS = ("Dense", "LogitsDense")


def measure(head: str, tokens: int, features: int, classes: int) -> None:
    """Prints the memory above that before the first step of this size in MB, and the seconds of a step."""
    import keras
    import tensorflow as tf

    import keras_xent as kx

    layer = {"Dense": keras.layers.Dense, "LogitsDense": kx.layers.LogitsDense}[head](classes, use_bias=False)
    layer.build((None, features))
    layer.quantize("int8")
    loss = kx.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function(autograph=False, reduce_retracing=True)
    def step(hidden, labels):
        with tf.GradientTape() as tape:
            tape.watch(hidden)
            value = loss(labels, layer(hidden))
        return value, tape.gradient(value, hidden)

    hidden = tf.random.normal((tokens, features))
    labels = tf.random.uniform((tokens,), 0, classes, tf.int64)
    step(hidden[:64], labels[:64])
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(4):
        begin = time.perf_counter()
        step(hidden, labels)[1].numpy()
        seconds.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{(peak - before) / 1024:.0f} {min(seconds[1:]):.2f}")


def main() -> None:
    """Prints the table."""
    print("| tokens x features x classes | logits: MB, s | in chunks: MB, s |", "|---|---|---|", sep="\n")
    for size in SIZES:
        cells = []
        for head in HEADS:
            command = [sys.executable, __file__, head, *map(str, size)]
            last = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
            cells.append(", ".join(last))
        print(f"| {' x '.join(map(str, size))} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1], *map(int, sys.argv[2:]))
    else:
        main()
