"""Train with a vocabulary of 131,072 entries on batches whose logits alone would fill the memory of this machine.

    python examples/large_vocabulary.py            # about five minutes on two cores with 25 GB
    python examples/large_vocabulary.py --smoke    # small batches, whose logits fit, in a minute

The tokenizer is tekken, which the package `mistral-common` carries; the text is that of language_model.py. The same
model is trained twice, in two processes: with `TiedLogits` and our loss, and with the layer and the loss
of Keras. Both are stopped where they ask for more than the machine has.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from importlib.resources import files
from pathlib import Path

import keras
import matplotlib
import numpy as np
from language_model import read_documents

import keras_xent as kx

matplotlib.use("Agg")  # draws into a file, on machines without a screen too
from matplotlib import pyplot

HEADS = {"fused": "TiedLogits and our loss", "dense": "Keras' layer and loss"}


def read_tokens(length, documents):
    """Training and validation sequences `[B, length + 1]`, and the size of the vocabulary."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    tekken = Tekkenizer.from_file(str(files("mistral_common") / "data" / "tekken_240911.json"))
    sequences = []
    for part in read_documents(documents):
        stream = [t for document in part for text in document for t in tekken.encode(text, bos=False, eos=False)]
        sequences.append(np.array(stream[: len(stream) // (length + 1) * (length + 1)]).reshape(-1, length + 1))
    return *sequences, tekken.n_words


def build_model(head, vocabulary, length, width, heads):
    """A causal transformer of one block, whose embedding is also its output layer."""
    embedding = (kx.layers.TiedLogits if head == "fused" else keras.layers.ReversibleEmbedding)(vocabulary, width)
    tokens = keras.Input([length], dtype="int32", name="tokens")
    positions = keras.ops.cumsum(keras.ops.ones_like(tokens), axis=1) - 1
    x = keras.layers.Add()([embedding(tokens), keras.layers.Embedding(length, width)(positions)])
    h = keras.layers.LayerNormalization()(x)
    x = keras.layers.Add()([x, keras.layers.MultiHeadAttention(heads, width // heads)(h, h, use_causal_mask=True)])
    h = keras.layers.Dense(4 * width, activation="gelu")(keras.layers.LayerNormalization()(x))
    x = keras.layers.LayerNormalization()(keras.layers.Add()([x, keras.layers.Dense(width)(h)]))
    return keras.Model(tokens, embedding(x, reverse=True))


def train(head, output, batch_size, epochs, vocabulary):
    """Trains one of the two models in a process of its own, and prints the result."""
    import resource

    # An error, before the system has to end something.
    limit = int(memory_of_process("data") + 0.9 * free_memory())
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    keras.utils.set_random_seed(0)
    training, validation = np.load(output / "training.npy"), np.load(output / "validation.npy")
    model = build_model(head, vocabulary, training.shape[1] - 1, width=64, heads=4)
    if head == "fused":
        loss = kx.losses.MaskedSequenceCrossentropy()
    else:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=[kx.metrics.Perplexity()] if head == "fused" else [])
    samples, done = [], threading.Event()
    begin, start = time.perf_counter(), memory_of_process("resident")

    def sample():
        while not done.wait(0.02):
            samples.append((time.perf_counter() - begin, memory_of_process("resident") - start))

    threading.Thread(target=sample, daemon=True).start()
    try:
        history = model.fit(
            training[:, :-1], training[:, 1:], batch_size, epochs, verbose=2 if head == "fused" else 0
        ).history
        scores = model.evaluate(validation[:, :-1], validation[:, 1:], 8, verbose=0, return_dict=True)
        result = {"loss": history["loss"], "validation": scores}
    except (MemoryError, RuntimeError, *tensorflow_errors()) as error:
        lines = str(error).strip().splitlines()
        result = {"error": next((line for line in lines if "OOM" in line), lines[0])}
    done.set()
    (output / f"{head}.json").write_text(json.dumps({**result, "samples": samples}))


def tensorflow_errors():
    """Returns the errors that TensorFlow raises when it runs out of memory, if it is the backend."""
    if keras.backend.backend() != "tensorflow":
        return ()
    import tensorflow as tf

    return (tf.errors.ResourceExhaustedError, tf.errors.InternalError)


def physical_memory():
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory():
    """Bytes of it that a process can get; what keeps files at hand is given away for it."""
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return 1024 * int(available.split()[1])


def memory_of_process(kind):
    """Bytes of memory that this process uses ("resident"), or has asked for to write into ("data")."""
    names = ("size", "resident", "shared", "text", "library", "data", "dirty")
    return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[names.index(kind)])


def draw(results, limit, path):
    """Memory over time, in both processes."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for head, result in results.items():
        seconds, bytes_ = np.array(result["samples"]).T
        axes.plot(seconds, bytes_ / 1e9, label=HEADS[head] + (": out of memory" if "error" in result else ""))
        if "error" in result:
            axes.plot(seconds[-1], bytes_[-1] / 1e9, "rx")
    if any("error" in result for result in results.values()):
        axes.axhline(limit / 1e9, color="gray", linestyle="--", label="memory of this machine")
    axes.set(xlabel="seconds since the start of fit", ylabel="memory over the start of fit, GB")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(output, smoke, epochs):
    """Make the data, train both in processes of their own, and compare."""
    begin = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    length = 128 if smoke else 512
    training, validation, vocabulary = read_tokens(length, documents=80 if smoke else None)
    limit = physical_memory()
    batch_size = 16 if smoke else -(-limit // (4 * length * vocabulary))
    if smoke:
        training, validation = training[: 2 * batch_size], validation[:batch_size]
    np.save(output / "training.npy", training)
    np.save(output / "validation.npy", validation)
    logits = 4 * batch_size * length * vocabulary
    print(f"{vocabulary:,} tokens in the vocabulary; {batch_size} sequences of {length} in a batch")
    print(f"The logits of a batch: {logits / 1e9:.1f} GB. The memory of this machine: {limit / 1e9:.1f} GB.")
    results = {}
    for head in HEADS:
        print(f"Training with {HEADS[head]} ...", flush=True)
        arguments = ["--train", head, "--batch-size", str(batch_size), "--vocabulary", str(vocabulary)]
        command = [sys.executable, __file__, *arguments, "--epochs", str(epochs), "--output", output]
        written = output / f"{head}.json"
        written.unlink(missing_ok=True)
        finished = subprocess.run(command, check=False)
        if written.exists():
            results[head] = json.loads(written.read_text())
        else:  # some libraries end the process where they get no memory
            results[head] = {"error": f"ended with status {finished.returncode}", "samples": [(0.0, limit)]}
    draw(results, limit, output / "memory.png")

    print("\nMost memory over the start of fit")
    for head, result in results.items():
        highest = max(bytes_ for _, bytes_ in result["samples"])
        outcome = f"loss of the last epoch {result['loss'][-1]:.4f}" if "loss" in result else result["error"]
        print(f"  {HEADS[head]:24} {highest / 1e9:8.2f} GB   {outcome}")
    if "error" in results["fused"]:
        sys.exit("Our head did not fit either: see its error above.")
    perplexity = results["fused"]["validation"]["perplexity"]
    print(f"\nValidation perplexity {perplexity:,.0f}; every token equally likely {vocabulary:,}.")
    print(f"Finished in {time.perf_counter() - begin:.0f} s. Memory over time: {output / 'memory.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small batches, in a minute")
    parser.add_argument("--epochs", type=int, help="default: 2, and 1 with --smoke")
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output/large_vocabulary"), metavar="DIR", help="default: %(default)s"
    )
    for hidden in "train", "batch-size", "vocabulary":
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    epochs = arguments.epochs or (1 if arguments.smoke else 2)
    if arguments.train:
        train(arguments.train, arguments.output, int(arguments.batch_size), epochs, int(arguments.vocabulary))
    else:
        main(arguments.output, arguments.smoke, epochs)
