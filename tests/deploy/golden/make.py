"""Makes model.keras and its numbers anew: `python -m tests.deploy.golden.make`, on the lowest versions of setup.cfg.

Only for a further file: those that are here were saved by an earlier version, and have to load for ever.
"""

import json
import pathlib

import keras
import numpy as np

import keras_xent as kx

HERE = pathlib.Path(__file__).parent
V = 11


def data():
    """Inputs and the labels of each output."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, V, (6, 5)).astype("int32")
    tokens[0, 3:] = 0
    targets = {
        "next": rng.integers(0, V, (6, 5)),
        "tag": rng.integers(0, 3, (6, 5)),
        "topic": rng.dirichlet(np.ones(4), 6).astype("float32"),
        "flags": rng.integers(-1, 2, (6, 2)),
    }
    return tokens, targets


def model():
    """Every loss, layer and metric of the package, no argument at its default if another one makes sense."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input([None], dtype="int32")
    embedding = kx.layers.TiedLogits(V, 4, logit_soft_cap=30.0, name="next")
    x = keras.layers.Dense(4, activation="gelu")(embedding(inputs))
    pooled = keras.layers.GlobalAveragePooling1D()(x)
    outputs = {
        "next": embedding(x, reverse=True),
        "tag": kx.layers.LogitsDense(3, name="tag")(x),
        "topic": keras.layers.Dense(4, activation="softmax", name="topic")(pooled),
        "flags": keras.layers.Dense(2, activation="sigmoid", name="flags")(pooled),
    }
    result = keras.Model(inputs, outputs)
    result.compile(
        keras.optimizers.Adam(0.01),
        loss={
            "next": kx.losses.MaskedSequenceCrossentropy(ignore_class=0, label_smoothing=0.1, z_loss=1e-3),
            "tag": kx.losses.SparseCategoricalCrossentropy(from_logits=True, class_weight={1: 2.0}, focal_gamma=1.0),
            "topic": kx.losses.CategoricalCrossentropy(label_smoothing=0.2),
            "flags": kx.losses.BinaryCrossentropy(ignore_class=-1, pos_weight=[1.0, 3.0]),
        },
        metrics={
            "next": [kx.metrics.Perplexity(ignore_class=0), kx.metrics.BitsPerByte([1.0] * V, ignore_class=0)],
            "tag": [kx.metrics.TokenAccuracy()],
        },
    )
    return result


def numbers(loaded):
    """What a model gives: evaluated, and the loss of three steps more."""
    tokens, targets = data()
    evaluated = loaded.evaluate(tokens, targets, verbose=0, return_dict=True)
    steps = loaded.fit(tokens, targets, epochs=3, batch_size=6, shuffle=False, verbose=0).history["loss"]
    return {"evaluated": evaluated, "steps": steps}


if __name__ == "__main__":
    made = model()
    made.fit(*data(), epochs=2, batch_size=6, shuffle=False, verbose=0)
    made.save(HERE / "model.keras")
    (HERE / "numbers.json").write_text(json.dumps(numbers(made), indent=2) + "\n")
