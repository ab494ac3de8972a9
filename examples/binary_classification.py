"""Find rare tumors with `pos_weight`, and make the probabilities true again afterwards.

    python examples/binary_classification.py            # three seeds, about half a minute on two cores
    python examples/binary_classification.py --smoke    # one seed, in seconds

The data are scikit-learn's breast cancer measurements. To leave some doubt, the model sees two of the thirty, texture
and smoothness. Of the malignant cases every third is kept, so that five benign ones come to each.

A loss that weighs positive labels by `w` finds more of them. Its probabilities are then too high, since it sees a world
with `w` times as many positives: the best logit is `ln(p / (1 - p)) + ln w`. Subtracting `ln w` makes them true, and
the threshold `1 / (1 + w)` in place of 1/2 makes the same decisions.
"""

import argparse
from pathlib import Path

import keras
import matplotlib
import numpy as np
from sklearn.datasets import load_breast_cancer

import keras_xent as kx

matplotlib.use("Agg")  # draws into a file, on machines without a screen too
from matplotlib import pyplot

COLUMNS = ["mean texture", "mean smoothness"]
ROWS = ("no weight", "pos_weight", "pos_weight, corrected")


def read_cases(rng):
    """Training and test cases, half each: measurements `[B, 2]`, standardized, and labels `[B]`, 1 for malignant."""
    data = load_breast_cancer()
    features = data.data[:, [list(data.feature_names).index(name) for name in COLUMNS]]
    malignant = rng.permutation(np.flatnonzero(data.target == 0))[::3]
    benign = rng.permutation(np.flatnonzero(data.target == 1))
    training, test = (np.concatenate([malignant[half::2], benign[half::2]]) for half in (0, 1))
    features = (features - features[training].mean(axis=0)) / features[training].std(axis=0)
    labels = 1 - data.target
    return (features[training], labels[training]), (features[test], labels[test])


def fit(features, labels, pos_weight, epochs):
    """A small network that returns logits `[B, 1]`."""
    model = keras.Sequential([keras.Input([len(COLUMNS)]), keras.layers.Dense(16, "tanh"), keras.layers.Dense(1)])
    loss = kx.losses.BinaryCrossentropy(from_logits=True, pos_weight=pos_weight)
    model.compile(keras.optimizers.Adam(0.01), loss)
    model.fit(features, labels, batch_size=32, epochs=epochs, verbose=0)
    return model


def reliability(probabilities, labels, groups=8):
    """Mean probability and share of positives, in groups of equal size from the least to the most probable."""
    parts = np.array_split(np.argsort(probabilities), groups)
    return np.array([[probabilities[part].mean(), labels[part].mean()] for part in parts]).T


def evaluate(seed, epochs):
    """By row of the table: probabilities of the test cases, their labels, and the figures."""
    keras.utils.set_random_seed(seed)
    training, (features, labels) = read_cases(np.random.default_rng(seed))
    weight = float(np.sum(training[1] == 0) / np.sum(training[1]))
    models = (fit(*training, w, epochs) for w in (None, weight))
    plain, weighted = (keras.ops.convert_to_numpy(model(features))[:, 0] for model in models)
    found = {}
    for row, logits in zip(ROWS, (plain, weighted, weighted - np.log(weight)), strict=True):
        p = 1 / (1 + np.exp(-logits))
        alarm = p > (1 / (1 + weight) if row == ROWS[2] else 1 / 2)
        calibration_error = kx.metrics.CalibrationError(bins=8)
        calibration_error.update_state(labels, logits)
        found[row] = {
            "probabilities": p,
            "labels": labels,
            "found": alarm[labels == 1].mean(),
            "false alarms": alarm[labels == 0].mean(),
            "calibration error": float(calibration_error.result()),
        }
    return found


def draw(results, path):
    """Draws predicted probabilities against observed frequencies, over the test cases of all seeds."""
    figure, axes = pyplot.subplots(figsize=(5, 5), layout="constrained")
    axes.plot([0, 1], [0, 1], color="gray", linestyle="--", label="true probabilities")
    for row in ROWS:
        p, labels = (np.concatenate([result[row][key] for result in results]) for key in ("probabilities", "labels"))
        axes.plot(*reliability(p, labels), marker="o", label=row)
    axes.set(xlabel="probability of a tumor, as predicted", ylabel="share of tumors", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=100)


def main(output, seeds, epochs):
    """Train with and without weight from each seed; the figures by seed and row."""
    output.mkdir(parents=True, exist_ok=True)
    results = [evaluate(seed, epochs) for seed in range(seeds)]
    columns = ("found", "false alarms", "calibration error")
    print(f"seed  {'':22}" + "".join(f"{column:>19}" for column in columns))
    for seed, result in enumerate(results):
        for row in ROWS:
            print(f"{seed:4}  {row:22}" + "".join(f"{result[row][column]:19.3f}" for column in columns))
    draw(results, output / "calibration.png")
    print(f"Predicted and true probabilities: {output / 'calibration.png'}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one seed, in seconds")
    parser.add_argument("--seeds", type=int, help="default: 3, and 1 with --smoke")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output/binary_classification"),
        metavar="DIR",
        help="default: %(default)s",
    )
    arguments = parser.parse_args()
    main(arguments.output, arguments.seeds or (1 if arguments.smoke else 3), epochs=40)
