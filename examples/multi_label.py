"""Learn many labels, most of them missing: ignore these instead of taking them for "no".

    python examples/multi_label.py            # three seeds, about half a minute on two cores
    python examples/multi_label.py --smoke    # one seed, in seconds

The data come with Python: the names of Unicode's characters, and nine properties of each, from `unicodedata`. A model
reads the words of a name and says which properties the character has. For training, four of five labels are hidden, as
if each annotator looked at some of the labels only. The same model is trained three times: with `ignore_class=-1`,
with the missing labels taken for "no", and with all labels, which is the most that could be reached.
"""

import argparse
import unicodedata
from collections import Counter

import keras
import numpy as np
from sklearn.metrics import f1_score

import keras_xent as kx

PROPERTIES = {
    "letter": lambda c: unicodedata.category(c).startswith("L"),
    "uppercase": lambda c: unicodedata.category(c) == "Lu",
    "lowercase": lambda c: unicodedata.category(c) == "Ll",
    "mark": lambda c: unicodedata.category(c).startswith("M"),
    "number": lambda c: unicodedata.category(c).startswith("N"),
    "symbol": lambda c: unicodedata.category(c).startswith("S"),
    "right to left": lambda c: unicodedata.bidirectional(c) in ("R", "AL"),
    "decomposes": lambda c: unicodedata.decomposition(c) != "",
    "wide": lambda c: unicodedata.east_asian_width(c) in ("W", "F"),
}
MISSING = -1
ROWS = ("missing left out", "missing taken for no", "all labels")


def read_characters(rng, size):
    """The words of a random choice of names, and the labels `[size, 9]` of their characters."""
    # The names of the great ideographic blocks hold a number in place of words.
    named = [chr(code) for code in range(0x20000) if "-" not in unicodedata.name(chr(code), "-")]
    chosen = rng.choice(named, size, replace=False)
    names = [unicodedata.name(c).split() for c in chosen]
    return names, np.array([[has(c) for has in PROPERTIES.values()] for c in chosen], "int32")


def bags_of_words(names, vocabulary):
    """Returns which words of the vocabulary each name contains, `[B, words]`."""
    return np.array([[word in name for word in vocabulary] for name in map(set, names)], "float32")


def fit(inputs, labels, epochs):
    """A linear model that returns logits `[B, 9]`, one for each property."""
    model = keras.Sequential([keras.Input([inputs.shape[1]]), keras.layers.Dense(len(PROPERTIES))])
    loss = kx.losses.BinaryCrossentropy(from_logits=True, ignore_class=MISSING)
    model.compile(keras.optimizers.Adam(0.02), loss)
    model.fit(inputs, labels, batch_size=100, epochs=epochs, verbose=0)
    return model


def evaluate(seed, epochs, size):
    """By row of the table: the F1 score of each property, and the share of characters with every property right."""
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    names, labels = read_characters(rng, 2 * size)
    words = Counter(word for name in names[:size] for word in name)
    inputs = bags_of_words(names, [word for word, count in words.items() if count >= 3])
    known = rng.random((size, len(PROPERTIES))) < 0.2
    targets = {
        ROWS[0]: np.where(known, labels[:size], MISSING),
        ROWS[1]: np.where(known, labels[:size], 0),
        ROWS[2]: labels[:size],
    }
    found = {}
    for row in ROWS:
        logits = keras.ops.convert_to_numpy(fit(inputs[:size], targets[row], epochs)(inputs[size:]))
        answers = (logits > 0).astype("int32")
        scores = f1_score(labels[size:], answers, average=None, zero_division=0)
        found[row] = {**dict(zip(PROPERTIES, scores, strict=True)), "mean F1": scores.mean()}
        found[row]["all right"] = (answers == labels[size:]).all(axis=1).mean()
    return found


def main(seeds, epochs, size):
    """Train with missing and with all labels from each seed; the figures by seed and row."""
    results = [evaluate(seed, epochs, size) for seed in range(seeds)]
    print(f"Over seeds 0 to {seeds - 1}" + "".join(f"{row:>24}" for row in ROWS))
    for measure in results[0][ROWS[0]]:
        means = [np.mean([result[row][measure] for result in results]) for row in ROWS]
        print(f"{measure:15}" + "".join(f"{mean:24.3f}" for mean in means))
    for seed, result in enumerate(results):
        print(f"seed {seed}, mean F1" + "".join(f"{result[row]['mean F1']:24.3f}" for row in ROWS))
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one seed, in seconds")
    parser.add_argument("--seeds", type=int, help="default: 3, and 1 with --smoke")
    arguments = parser.parse_args()
    main(arguments.seeds or (1 if arguments.smoke else 3), epochs=10, size=4000)
