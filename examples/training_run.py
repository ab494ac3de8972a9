"""Train the language model of language_model.py as long runs are trained: interrupted, and with a look inside.

    python examples/training_run.py            # about three minutes on two cores
    python examples/training_run.py --smoke    # the same steps at toy size, in seconds

Each batch is computed in micro-batches (`accumulate_gradients`), the model is validated every few steps within an
epoch (`ValidateEvery`), and the perplexity of two groups of documents is followed apart (`Perplexity(groups=...)`).
The run is killed half way; a second process continues it from its last checkpoint, and the curves of both are one.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import keras
import language_model
import matplotlib
import numpy as np
from tokenizers import ByteLevelBPETokenizer

import keras_xent

matplotlib.use("Agg")  # draws into a file, on machines without a screen too
from matplotlib import pyplot

GROUPS = ["statements", "other topics"]


class Kill(keras.callbacks.Callback):
    """Ends the process without a warning, as a machine does that is taken away."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def on_train_batch_end(self, batch, logs=None):
        """Called after each step."""
        self.steps -= 1
        if self.steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Rows(keras.callbacks.Callback):
    """Writes a line after each validation: the step, and the perplexity of each group."""

    def __init__(self, path):
        super().__init__()
        self.path, self.validate = path, None

    def on_epoch_end(self, epoch, logs=None):
        """Called after each validation by `ValidateEvery`."""
        row = {name: value for name, value in logs.items() if name.startswith("val_perplexity")}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": self.validate.history["step"][-1], **row}) + "\n")


def read_groups(limit):
    """Documents on statements of the language, and on everything else."""
    names = sorted(topics)[:limit]
    is_statement = [" statement" in topics[name].splitlines()[0] for name in names]
    return [[topics[n] for n, yes in zip(names, is_statement, strict=True) if yes is group] for group in (True, False)]


def data(smoke):
    """Inputs, targets and groups of the training and the validation rows, and the size of the vocabulary."""
    groups = read_groups(40 if smoke else None)
    vocabulary, max_length = (400, 32) if smoke else (1000, 128)
    tokenizer = ByteLevelBPETokenizer()
    special_tokens = ["[PAD]", "[START]"]  # numbers 0 and 1
    tokenizer.train_from_iterator(sum(groups, []), vocabulary, special_tokens=special_tokens, show_progress=False)
    parts = {"training": ([], []), "validation": ([], [])}
    for number, documents in enumerate(groups):
        for name, chosen in (
            ("validation", documents[::8]),
            ("training", [d for i, d in enumerate(documents) if i % 8]),
        ):
            rows = language_model.encode([d.split("\n\n") for d in chosen], tokenizer, max_length)
            parts[name][0].extend(rows)
            parts[name][1].extend([number] * len(rows))
    found = {}
    for name, (rows, numbers) in parts.items():
        inputs, targets = language_model.pad(rows, max_length)
        chosen = np.random.default_rng(0).permutation(len(rows))[: 128 if smoke else None]
        found[name] = {"tokens": inputs[chosen], "group": np.array(numbers)[chosen]}, targets[chosen]
    return found["training"], found["validation"], vocabulary, max_length


def train(output, smoke, kill_at):
    """The run, from the last checkpoint if there is one; killed after `kill_at` steps if that is not 0."""
    (x, y), validation, vocabulary, max_length = data(smoke)
    keras.utils.set_random_seed(0)
    size = (1, 32, 2) if smoke else (2, 96, 4)
    plain = language_model.build_model(vocabulary, max_length, *size, dropout=0.0)
    model = keras.Model([plain.input], plain.output)
    by_group = keras_xent.metrics.Perplexity(ignore_class=language_model.PAD, groups=GROUPS, group_of="group")
    loss = keras_xent.losses.MaskedSequenceCrossentropy(ignore_class=language_model.PAD)
    model.compile(keras.optimizers.AdamW(2e-3, weight_decay=0.1), loss, metrics=[by_group])
    model = keras_xent.accumulate_gradients(model, steps=4)

    rows = Rows(output / "validations.jsonl")
    validate = keras_xent.callbacks.ValidateEvery(5 if smoke else 50, validation, callbacks=[rows])
    rows.validate = validate
    callbacks = [
        keras.callbacks.BackupAndRestore(output / "backup", delete_checkpoint=False),
        keras_xent.callbacks.PerplexityLogger(output / "log.csv", update_freq=1),
        validate,
        *([Kill(kill_at)] if kill_at else []),
    ]
    model.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)


def draw(output, killed_at):
    """The perplexity of the batches, and of each group in validation, of both processes as one curve."""
    with (output / "log.csv").open() as file:
        batches = [row for row in csv.DictReader(file) if row["kind"] == "batches"]
    # Of the steps that were trained again after the kill, the later row counts.
    validations = {row["step"]: row for row in map(json.loads, (output / "validations.jsonl").open())}
    steps = sorted(validations)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(
        *zip(*((int(r["step"]), float(r["perplexity"])) for r in batches), strict=True), alpha=0.3, label="batches"
    )
    for name in GROUPS:
        axes.plot(
            steps, [validations[s][f"val_perplexity/{name}"] for s in steps], marker="o", label=f"validation, {name}"
        )
    axes.axvline(killed_at, color="gray", linestyle="--", label="killed")
    axes.set(xlabel="step", ylabel="perplexity per token", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend()
    figure.savefig(output / "curves.png", dpi=150)
    return [validations[step] for step in steps]


def main(output, smoke):
    """A process that is killed, one that continues, and the picture of both."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    steps = -(-len(data(smoke)[0][1]) // 16)
    # In the middle of the second epoch.
    kill_at = steps + steps // 2
    command = [sys.executable, __file__, "--train", "--output", output, *(["--smoke"] if smoke else [])]
    killed = subprocess.run([*command, "--kill-at", str(kill_at)])
    print(f"{steps} steps in an epoch; killed after step {kill_at} (return code {killed.returncode})")
    subprocess.run(command, check=True)
    for row in draw(output, kill_at):
        figures = ", ".join(f"{name} {row[f'val_perplexity/{name}']:.1f}" for name in GROUPS)
        print(f"  step {row['step']:4d}: perplexity {row['val_perplexity']:.1f} ({figures})")
    print(f"Curves: {output / 'curves.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="every step at toy size, in seconds")
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output/training_run"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--kill-at", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.output, arguments.smoke, arguments.kill_at)
    else:
        main(arguments.output, arguments.smoke)
