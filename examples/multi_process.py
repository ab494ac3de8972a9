"""Train one model in several processes, with more tokens in one than in the other, to what one process alone gives.

    python examples/multi_process.py            # two processes of this machine, then one; about a minute
    python examples/multi_process.py --smoke    # fewer lines of text

    # On real machines, one process on each; process 0 runs at the address:
    python examples/multi_process.py --processes 4 --process 0 --address 10.0.0.1:8476

The engine is `keras.distribution` over `jax.distributed`, so the backend is JAX. Every process reads its own rows of
each batch. The first ones get the long lines and the last ones the short ones, so that a mean of the processes' means
would be a different number; `token_mean` is the mean over all tokens of all processes, and so are the metrics.

With `--backup FOLDER`, one that all machines see, a run that was interrupted resumes after its last whole epoch.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import argparse
import pydoc_data.topics
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils

import keras_xent as kx

LENGTH = 64
CHARACTERS = 128
PADDING = 0
BATCH = 64


def read_lines(count):
    """Lines of text `[B, T]` as character codes, 0 after their end, and the next characters `[B, T]`."""
    text = "\n".join(pydoc_data.topics.topics.values())
    lines = [line.strip() for line in text.splitlines() if line.isascii() and line.strip()][:count]
    codes = [[ord(character) for character in line] for line in lines]
    padded = keras.utils.pad_sequences(codes, LENGTH + 1, padding="post", truncating="post", value=PADDING)
    return padded[:, :-1], padded[:, 1:]


def rows_of(process, processes, tokens, labels):
    """The rows that a process reads: of every batch its part, the longest lines in the first one."""
    tokens, labels = (array[: len(array) // BATCH * BATCH] for array in (tokens, labels))
    by_length = np.argsort(-np.count_nonzero(labels, axis=1), kind="stable")
    # Batch i is of rows i, i + steps, i + 2 steps, ... of those in order, so that every batch has all lengths.
    steps = len(tokens) // BATCH
    places = by_length.reshape(BATCH, steps).T.reshape(steps, processes, -1)[:, process].ravel()
    return tokens[places], labels[places]


def build_model():
    """A small causal network that returns logits `[B, T, 128]`."""
    layers = [keras.layers.Conv1D(64, 5, padding="causal", dilation_rate=d, activation="gelu") for d in (1, 4)]
    head = kx.layers.LogitsDense(CHARACTERS)
    model = keras.Sequential([keras.Input([LENGTH]), keras.layers.Embedding(CHARACTERS, 64), *layers, head])
    loss = kx.losses.MaskedSequenceCrossentropy(ignore_class=PADDING)
    # Two processes add up in another order than one. Where a gradient is nearly 0, Adam would make of that difference a
    # step of another size, and relu units that are on here and off there. SGD and gelu do not enlarge it.
    model.compile(keras.optimizers.SGD(0.3, momentum=0.9), loss, metrics=[kx.metrics.Perplexity(ignore_class=PADDING)])
    return model


class SaveEpochs(keras.callbacks.Callback):
    """Writes weights and optimizer to `folder/epoch-0001.weights.h5` and so on, and keeps the last two files.

    A file gets its name when it is whole, and the number of its epoch is in the name. `BackupAndRestore` has two files
    that it writes in place: a process that is killed meanwhile leaves a half for the others to read.
    """

    def __init__(self, folder, process):
        super().__init__()
        self.folder, self.process = folder, process
        folder.mkdir(parents=True, exist_ok=True)

    def on_epoch_end(self, epoch, logs=None):
        # All processes write, and the file of process 0 is kept: Keras compares each variable between the processes
        # while it saves, so that one of them alone would wait for the others forever.
        written = self.folder / f"process-{self.process}.weights.h5"
        self.model.save_weights(written)
        if self.process > 0:
            written.unlink()
            return
        written.replace(self.folder / f"epoch-{epoch + 1:04d}.weights.h5")
        for old in saved_epochs(self.folder)[:-2]:
            old.unlink()


def saved_epochs(folder):
    """The files that `SaveEpochs` has left in the folder, the last one at the end."""
    return sorted(folder.glob("epoch-*.weights.h5"))


def resume(model, folder):
    """Reads the last state in the folder and returns the number of its epoch, 0 where there is none."""
    files = saved_epochs(folder)
    last = int(files[-1].name[len("epoch-") :].split(".")[0]) if files else 0
    # The epoch that process 0 has found: a shared folder may show a new file to one machine before another.
    last = int(multihost_utils.broadcast_one_to_all(np.int32(last)))
    if last:
        model.optimizer.build(model.trainable_variables)
        model.load_weights(folder / f"epoch-{last:04d}.weights.h5")
    return last


def train(process, processes, address, epochs, lines, backup, output):
    """The work of one process; the first leaves the history and the weights in `output`."""
    if processes > 1:
        # As keras.distribution.initialize does, but where a process is lost the others end after 20 seconds, not 100,
        # and one that fails waits a minute for the others to end with it, not five.
        jax.distributed.initialize(
            address, processes, process, heartbeat_timeout_seconds=20, shutdown_timeout_seconds=60
        )
    # Each process reads rows of its own: there is nothing for Keras to divide.
    parallel = keras.distribution.DataParallel(auto_shard_dataset=False)
    keras.distribution.set_distribution(parallel)
    keras.utils.set_random_seed(0)
    tokens, labels = rows_of(process, processes, *read_lines(lines))
    print(f"process {process} of {processes}: {np.count_nonzero(labels)} tokens an epoch", flush=True)
    model = build_model()
    verbose = 2 if process == 0 else 0
    callbacks, first = ([SaveEpochs(backup, process)], resume(model, backup)) if backup else ([], 0)
    history = model.fit(
        tokens, labels, BATCH // processes, epochs, verbose, callbacks, shuffle=False, initial_epoch=first
    ).history
    if process == 0 and output:
        weights = {str(i): weight for i, weight in enumerate(model.get_weights())}
        np.savez(output, loss=history["loss"], perplexity=history["perplexity"], **weights)


def in_processes(count, output, *options):
    """Runs this script in so many processes of this machine, which meet at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, *options, "--processes", str(count), "--address", address, "--output", output]
    running = [subprocess.Popen([*command, "--process", str(process)]) for process in range(count)]
    if failed := [process for process, child in enumerate(running) if child.wait()]:
        raise SystemExit(f"Process {failed[0]} of {count} failed; what it said is above.")
    return dict(np.load(output))


def compare(options):
    """Trains in two processes and in one, and shows both."""
    with tempfile.TemporaryDirectory() as folder:
        two, one = (in_processes(count, str(Path(folder) / f"{count}.npz"), *options) for count in (2, 1))
    print("\nperplexity   two processes   one process")
    for epoch, pair in enumerate(zip(two["perplexity"], one["perplexity"], strict=True)):
        print(f"  epoch {epoch + 1}    {pair[0]:13.6f} {pair[1]:13.6f}")
    apart = {name: np.abs(two[name] / one[name] - 1).max() for name in ("loss", "perplexity")}
    names = [name for name in one if name.isdigit()]
    apart["weights"] = max(np.abs(two[name] - one[name]).max() / np.abs(one[name]).max() for name in names)
    print("largest relative difference: " + ", ".join(f"{name} {value:.1e}" for name, value in apart.items()))
    return apart


def main():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few lines of text")
    parser.add_argument("--epochs", type=int, default=3, help="default: 3")
    parser.add_argument("--processes", type=int, help="how many there are in all")
    parser.add_argument("--process", type=int, default=0, help="the number of this one, from 0")
    parser.add_argument("--address", help="address and port of process 0, the same for all")
    parser.add_argument("--backup", type=Path, help="folder that keeps the state of the last epoch")
    parser.add_argument("--output", type=Path, help="file for the history and the weights (.npz)")
    arguments = parser.parse_args()
    lines = 512 if arguments.smoke else 8192
    if arguments.processes is None:
        compare([*(["--smoke"] if arguments.smoke else []), "--epochs", str(arguments.epochs)])
        return
    train(
        arguments.process,
        arguments.processes,
        arguments.address,
        arguments.epochs,
        lines,
        arguments.backup,
        arguments.output,
    )


if __name__ == "__main__":
    main()
