"""Color Python code: a class for every character of lines of uneven length, padded, with label smoothing.

    python examples/sequence_labelling.py            # three seeds, about a minute on two cores
    python examples/sequence_labelling.py --smoke    # one seed and fewer lines, in seconds

The data are the sources of Python's own library; `tokenize` says what each character belongs to. Blanks between tokens
and the padding behind a line have the label -1: `ignore_class` keeps them out of the loss and out of both metrics. The
baseline gives each character the class that it has most often. Texts of several lines in quotes are left out: one line
of them does not show what it is.
"""

import argparse
import importlib
import inspect
import io
import keyword
import tokenize
from pathlib import Path

import keras
import matplotlib
import numpy as np

import keras_xent as kx

matplotlib.use("Agg")  # draws into a file, on machines without a screen too
from matplotlib import pyplot

CLASSES = ("keyword", "name", "number", "string", "comment", "operator")
COLOURS = ("tab:purple", "black", "tab:red", "tab:green", "tab:gray", "tab:blue")
IGNORED = -1
LENGTH = 80
# What `tokenize` calls them; since Python 3.12 an f-string comes in pieces such as FSTRING_START.
KINDS = {"NUMBER": "number", "STRING": "string", "FSTRING": "string", "COMMENT": "comment", "OP": "operator"}
TRAINING = "ast configparser csv dataclasses difflib functools inspect pprint"
TEST = "queue random shutil statistics textwrap"


def class_of(token):
    """The number of a token's class, or `IGNORED` for line ends and the like."""
    if token.type == tokenize.NAME:
        return CLASSES.index("keyword" if keyword.iskeyword(token.string) else "name")
    kind = tokenize.tok_name[token.type].partition("_")[0]
    return CLASSES.index(KINDS[kind]) if kind in KINDS else IGNORED


def read_lines(modules):
    """Lines `[B, T]` as character codes, 0 after their end, and the classes `[B, T]` of the characters."""
    codes, labels = [], []
    for module in modules.split():
        source = inspect.getsource(importlib.import_module(module))
        lines = {number: line for number, line in enumerate(source.splitlines(), start=1) if line.isascii()}
        classes = {number: np.full(len(line), IGNORED) for number, line in lines.items()}
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            (first, start), (last, end) = token.start, token.end
            if first < last:
                for number in range(first, last + 1):
                    lines.pop(number, None)
            elif first in lines:
                classes[first][start:end] = class_of(token)
        codes += [[ord(character) for character in line] for line in lines.values() if line.strip()]
        labels += [classes[number] for number, line in lines.items() if line.strip()]
    pad = {"maxlen": LENGTH, "padding": "post", "truncating": "post"}
    return keras.utils.pad_sequences(codes, **pad), keras.utils.pad_sequences(labels, value=IGNORED, **pad)


def build_model(width=48):
    """Convolutions that look 40 characters to each side, and return logits `[B, T, 6]`."""
    dilated = [keras.layers.Conv1D(width, 3, padding="same", dilation_rate=d, activation="relu") for d in (1, 3, 9, 27)]
    layers = [keras.layers.Embedding(128, width), *dilated, keras.layers.Dense(len(CLASSES))]
    return keras.Sequential([keras.Input([LENGTH], dtype="int32"), *layers])


def baseline_accuracy(training, test):
    """Accuracy on the test lines of the class that each character has most often in the training lines."""
    counts = np.zeros([128, len(CLASSES)])
    codes, labels = (array[training[1] != IGNORED] for array in training)
    np.add.at(counts, (codes, labels), 1)
    codes, labels = (array[test[1] != IGNORED] for array in test)
    return (counts.argmax(axis=1)[codes] == labels).mean()


def evaluate(seed, training, test, epochs):
    """The model, and its accuracy and perplexity on the test lines."""
    keras.utils.set_random_seed(seed)
    model = build_model()
    model.compile(
        keras.optimizers.Adam(3e-3),
        loss=kx.losses.MaskedSequenceCrossentropy(ignore_class=IGNORED, label_smoothing=0.05),
        metrics=[kx.metrics.TokenAccuracy(ignore_class=IGNORED), kx.metrics.Perplexity(ignore_class=IGNORED)],
    )
    model.fit(*training, batch_size=32, epochs=epochs, verbose=0)
    return model, model.evaluate(*test, batch_size=256, verbose=0, return_dict=True)


def draw(model, test, path, lines=20):
    """Test lines in the colors of the predicted classes; what is wrong is underlined in red."""
    codes, labels = (array[:lines] for array in test)
    predicted = keras.ops.convert_to_numpy(model(codes)).argmax(axis=-1)
    figure = pyplot.figure(figsize=(LENGTH / 11, lines / 5))
    for line, column in zip(*np.nonzero(labels != IGNORED), strict=True):
        place, guess = ((column + 1) / (LENGTH + 2), 1 - (line + 1) / (lines + 1)), predicted[line, column]
        figure.text(*place, chr(codes[line, column]), color=COLOURS[guess], family="monospace", size=9)
        if guess != labels[line, column]:
            figure.text(*place, "_", color="red", family="monospace", size=9, weight="bold")
    figure.savefig(path, dpi=100)


def main(output, seeds, every, epochs):
    """Train on one line in `every` from each seed; the baseline's accuracy, and the figures by seed."""
    output.mkdir(parents=True, exist_ok=True)
    training, test = [array[::every] for array in read_lines(TRAINING)], read_lines(TEST)
    baseline = baseline_accuracy(training, test)
    characters, places = np.sum(test[1] != IGNORED), test[1].size
    print(f"{len(training[0]):,} lines to learn from; {len(test[0]):,} of other modules")
    print(f"{characters / places:.0%} of the test characters are labeled; the others are blanks and padding")
    print(f"seed  {'':24}accuracy  perplexity\n      {'each character alone':24}{baseline:8.3f}")
    results = []
    for seed in range(seeds):
        model, found = evaluate(seed, training, test, epochs)
        results.append(found)
        print(f"{seed:4}  {'this model':24}{found['token_accuracy']:8.3f}{found['perplexity']:12.3f}")
    draw(model, test, output / "code.png")
    print(f"Code in colors: {output / 'code.png'}")
    return float(baseline), results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one seed and fewer lines, in seconds")
    parser.add_argument("--seeds", type=int, help="default: 3, and 1 with --smoke")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output/sequence_labelling"),
        metavar="DIR",
        help="default: %(default)s",
    )
    arguments = parser.parse_args()
    size = (4, 4) if arguments.smoke else (2, 6)
    main(arguments.output, arguments.seeds or (1 if arguments.smoke else 3), *size)
