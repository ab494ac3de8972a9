"""Trains on one device and on two replicas, and prints losses and weights as JSON.

Run as a module in a process of its own: two strategies on the CPU of one process get in each other's way.
"""

import json

import keras
import numpy as np

import keras_xent as kx
from tests.losses.cases import CLASSES

TOKENS = 12
# Valid tokens of the rows. A batch is two rows, one for each replica.
VALID = [(12, 2), (12, 0), (0, 2), (0, 0), (7, 5)]


def _sum():
    return kx.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")


def _data(rows=None):
    rng = np.random.default_rng(10)
    tokens = rng.integers(1, 7, (2 * len(VALID), TOKENS))
    for row, valid in zip(tokens, np.ravel(VALID), strict=True):
        row[valid:] = 0
    return tokens[:rows], rng.integers(0, CLASSES, tokens.shape)[:rows]


def _trained(loss, **data):
    import tensorflow as tf

    keras.utils.set_random_seed(11)
    model = keras.Sequential(
        [keras.Input((TOKENS,)), keras.layers.Embedding(7, 4, mask_zero=True), keras.layers.Dense(CLASSES)]
    )
    model.compile(keras.optimizers.SGD(0.5), loss, jit_compile="auto")
    data = tf.data.Dataset.from_tensor_slices(_data(**data)).batch(2)
    history = model.fit(data, epochs=2, verbose=0).history["loss"]
    return {"loss": history, "weights": [w.tolist() for w in model.get_weights()]}


def main():
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    # Of the last batch the second replica has no row.
    alone = _trained(_sum(), rows=9)
    token_mean = kx.losses.MaskedSequenceCrossentropy()
    labels = _data()[1]
    logits = np.random.default_rng(12).standard_normal((*labels.shape, CLASSES))
    outside = float(token_mean(labels, logits))
    with strategy.scope():
        results = {
            "sum": {"one device": alone, "two replicas": _trained(_sum(), rows=9)},
            "without replicas": {"outside": outside, "in the scope": float(token_mean(labels, logits))},
            "sum_over_batch_size": {
                "two replicas": _trained(kx.losses.SparseCategoricalCrossentropy(from_logits=True)),
                "keras on two replicas": _trained(keras.losses.SparseCategoricalCrossentropy(from_logits=True)),
            },
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
