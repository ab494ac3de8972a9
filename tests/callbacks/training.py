"""A small model on sequences of uneven length."""

import keras
import numpy as np

import keras_xent as kx

CLASSES, LENGTH, SEQUENCES, BATCH = 11, 6, 14, 4
STEPS = 4  # batches of an epoch, the last of two sequences


def data():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, CLASSES, (SEQUENCES, LENGTH + 1))
    for row, length in zip(tokens, np.sort(rng.integers(2, LENGTH + 2, SEQUENCES)), strict=True):
        row[length:] = 0
    return tokens[:, :-1], tokens[:, 1:]


def model(metrics=None, rate=0.05, loss=None, **options):
    keras.utils.set_random_seed(0)
    built = keras.Sequential(
        [keras.Input((LENGTH,)), keras.layers.Embedding(CLASSES, 8), kx.layers.LogitsDense(CLASSES)]
    )
    built.compile(
        keras.optimizers.Adam(rate),
        loss or kx.losses.MaskedSequenceCrossentropy(ignore_class=0, label_smoothing=0.1),
        metrics=[kx.metrics.Perplexity(ignore_class=0)] if metrics is None else metrics,
        **options,
    )
    return built


def fit(built, *callbacks, epochs=2, validation=True, **options):
    x, y = data()
    options = {"batch_size": BATCH, "verbose": 0, "shuffle": False, **options}
    if validation:
        options["validation_data"] = (x[:5], y[:5])
    return built.fit(x, y, epochs=epochs, callbacks=list(callbacks), **options).history


class Evaluating(keras.callbacks.Callback):
    """Evaluates the model at the end of each epoch, before the callbacks that come after it are asked."""

    def __init__(self, *callbacks):
        super().__init__()
        self.callbacks = list(callbacks)

    def on_epoch_end(self, epoch, logs=None):
        x, y = data()
        self.model.evaluate(x[-3:], y[-3:], verbose=0, callbacks=self.callbacks)
