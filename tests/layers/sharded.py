"""Trains on one device, and with the head's classes sharded over two, and prints losses and weights as JSON.

Run as a module in a process of its own, on JAX: the number of devices of a process is fixed when JAX starts.
"""

import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import keras
import numpy as np
from keras import distribution

import keras_xent as kx

VOCABULARY, FEATURES, LENGTH = 62, 8, 13


def _trained():
    keras.utils.set_random_seed(0)
    tokens = keras.Input((LENGTH,), dtype="int32")
    hidden = keras.layers.Dense(FEATURES, activation="tanh")(keras.layers.Embedding(VOCABULARY, FEATURES)(tokens))
    model = keras.Model(tokens, kx.layers.LogitsDense(VOCABULARY, name="logits")(hidden))
    perplexity = kx.metrics.Perplexity(ignore_class=0)
    model.compile(keras.optimizers.SGD(0.5), kx.losses.MaskedSequenceCrossentropy(ignore_class=0), metrics=[perplexity])
    x, y = np.random.default_rng(0).integers(0, VOCABULARY, (2, 16, LENGTH))
    history = model.fit(x, y, 8, epochs=2, shuffle=False, verbose=0).history
    shards = {w.path: len({tuple(map(str, s.index)) for s in w.value.addressable_shards}) for w in model.weights}
    return {**history, "weights": [w.tolist() for w in model.get_weights()], "shards": shards}


def main():
    results = {"one device": _trained()}
    mesh = distribution.DeviceMesh((1, 2), ("batch", "model"), distribution.list_devices("cpu"))
    layout = distribution.LayoutMap(mesh)
    layout["logits/kernel"] = (None, "model")
    layout["logits/bias"] = ("model",)
    distribution.set_distribution(distribution.ModelParallel(layout_map=layout, batch_dim_name="batch"))
    results["two devices"] = _trained()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
