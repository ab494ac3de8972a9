"""Trains on two replicas with and without `ValidateEvery`, and prints histories and weights as JSON.

Run as a module in a process of its own: two strategies on the CPU of one process get in each other's way.
"""

import json

import keras

import keras_xent as kx
from tests.callbacks.training import data, fit, model


def main():
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    x, y = data()
    found = []
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        for validates in (None, kx.callbacks.ValidateEvery(1, (x[:5], y[:5]), batch_size=2)):
            built = model()
            history = fit(built, *filter(None, [validates]), validation=False)
            history = {name: values for name, values in history.items() if not name.startswith("val_")}
            found.append([history, [w.tolist() for w in built.get_weights()]])
    x, y = x[:5], y[:5]
    alone = keras.Sequential(built.layers)
    alone.compile(loss=built.loss, metrics=[kx.metrics.Perplexity(ignore_class=0)])
    last = alone.evaluate(x, y, verbose=0, return_dict=True)["perplexity"]
    print(json.dumps({"runs": found, "validated": validates.history["val_perplexity"], "last": last}))


if __name__ == "__main__":
    main()
