"""Draws the pictures of docs/theory.md: `python tools/theory.py [FOLDER]`, by default into docs/."""

import sys
from pathlib import Path

import keras
import matplotlib
import numpy as np

import keras_xent as kx

matplotlib.use("Agg")  # draws into a file, on machines without a screen too
from matplotlib import pyplot


def draw_cost(axes):
    """-ln q, with the two forecasts of the page."""
    q = np.geomspace(5e-5, 1, 400)
    axes.plot(q, -np.log(q))
    for point, place in ((0.9, (0.72, 1.2)), (0.0001, (0.05, 9.1))):
        axes.plot(point, -np.log(point), "o", color="tab:red")
        axes.annotate(f"{point:g} costs {-np.log(point):.3g}", (point, -np.log(point)), place)
    axes.set(xlabel="probability q given to what happened", ylabel="cost -ln q, nats", ylim=(0, 10))


def draw_divergence(axes):
    """Cross-entropy of a coin by what is believed of it: the entropy, and the divergence above."""
    p, q = 0.7, np.linspace(0.02, 0.98, 200)
    cross_entropy = -p * np.log(q) - (1 - p) * np.log(1 - q)
    entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
    axes.fill_between(q, entropy, label="entropy H(p)", color="tab:gray", alpha=0.4)
    axes.fill_between(q, entropy, cross_entropy, label="divergence KL(p || q)", color="tab:orange", alpha=0.4)
    axes.plot(q, cross_entropy, label="cross-entropy H(p, q)")
    axes.set(xlabel="believed probability of heads q (true: 0.7)", ylabel="nats", ylim=(0, 2))
    axes.legend(loc="upper center")


def draw_steps(axes, start=0.001, steps=600):
    """Returns the output of a neuron that starts at `start` after each step of gradient descent, under both losses."""
    true = np.ones([1, 1])
    for loss, name in (
        (kx.losses.BinaryCrossentropy(), "cross-entropy"),
        (keras.losses.MeanSquaredError(), "squared error"),
    ):
        weight = keras.initializers.Constant(np.log(start / (1 - start)))
        sigmoid = keras.layers.Dense(1, "sigmoid", use_bias=False, kernel_initializer=weight)
        neuron = keras.Sequential([keras.Input([1]), sigmoid])
        neuron.compile(keras.optimizers.SGD(1.0), loss)
        said = [start]
        for _ in range(steps):
            neuron.train_on_batch(true, true)
            said.append(float(neuron(true)[0, 0]))
        axes.plot(said, label=name)
    axes.axhline(0.9, color="gray", linestyle="--", linewidth=1)
    axes.set(xlabel="step", ylabel="probability given to what is true", ylim=(0, 1.02))
    axes.legend(loc="center")


PICTURES = {"cost": draw_cost, "divergence": draw_divergence, "steps": draw_steps}


def main(folder):
    """Draws each picture into a file of its own."""
    for name, draw in PICTURES.items():
        figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
        draw(axes)
        figure.savefig(folder / f"theory-{name}.png", dpi=90)
        pyplot.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "docs")
