"""Teach a small network by the probabilities of a large one: it learns a digit of which it never saw an image.

    python examples/distillation.py            # three seeds, about a minute on two cores
    python examples/distillation.py --smoke    # one seed and one temperature, in seconds

The experiment is that of section 3 of "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531), with
scikit-learn's digits. The teacher has seen all ten digits, the students no three. From labels a student cannot learn
what a three is. From the teacher's distributions it can: they say how much each five or eight looks like a three. The
targets are `softmax(logits / T)`: the higher the temperature `T`, the more the small probabilities weigh.

(The student's logits are then those of temperature `T`, and `T` times them its own; the digit they choose is the same.)
"""

import argparse

import keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_xent as kx

UNSEEN = 3


def build_model(width):
    """A network of two layers that returns logits `[B, 10]`."""
    layers = [keras.layers.Dense(width, "relu"), keras.layers.Dense(width, "relu"), keras.layers.Dense(10)]
    return keras.Sequential([keras.Input([64]), *layers])


def train_on_labels(model, images, labels, epochs):
    """The usual training, for the teacher and for the student that it is compared with."""
    model.compile(keras.optimizers.Adam(3e-3), kx.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images, labels, batch_size=64, epochs=epochs, verbose=0)


def distil(teacher, student, images, temperature, epochs):
    """Train the student on the teacher's distributions: no labels."""
    soft_targets = keras.ops.convert_to_numpy(keras.ops.softmax(teacher(images) / temperature))
    student.compile(keras.optimizers.Adam(3e-3), kx.losses.CategoricalCrossentropy(from_logits=True))
    student.fit(images, soft_targets, batch_size=64, epochs=epochs, verbose=0)


def accuracies(model, images, labels):
    """Accuracy on all test images, and on those of the unseen digit."""
    hits = keras.ops.convert_to_numpy(model(images)).argmax(axis=1) == labels
    return {"all digits": hits.mean(), "unseen digit": hits[labels == UNSEEN].mean()}


def evaluate(seed, epochs, temperatures):
    """By row of the table: the accuracies."""
    keras.utils.set_random_seed(seed)
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, train_size=1200, stratify=labels, random_state=seed)
    training, test, training_labels, test_labels = parts
    seen = training_labels != UNSEEN

    teacher = build_model(128)
    train_on_labels(teacher, training, training_labels, epochs)
    found = {"teacher": accuracies(teacher, test, test_labels)}
    student = build_model(32)
    train_on_labels(student, training[seen], training_labels[seen], epochs)
    found["student of the labels"] = accuracies(student, test, test_labels)
    for temperature in temperatures:
        student = build_model(32)
        distil(teacher, student, training[seen], temperature, epochs)
        found[f"student of the teacher, T = {temperature}"] = accuracies(student, test, test_labels)
    return found


def main(seeds, epochs, temperatures):
    """Train teacher and students from each seed; the accuracies by seed and row."""
    print(f"Accuracy on test images; the students never saw a {UNSEEN}")
    print(f"seed  {'':30}{'all digits':>12}{f'only {UNSEEN}':>12}", flush=True)
    results = []
    for seed in range(seeds):
        results.append(evaluate(seed, epochs, temperatures))
        for row, found in results[-1].items():
            print(f"{seed:4}  {row:30}{found['all digits']:12.3f}{found['unseen digit']:12.3f}", flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one seed and one temperature, in seconds")
    parser.add_argument("--seeds", type=int, help="default: 3, and 1 with --smoke")
    arguments = parser.parse_args()
    temperatures = (4,) if arguments.smoke else (1, 2, 4)
    main(arguments.seeds or (1 if arguments.smoke else 3), 20, temperatures)
