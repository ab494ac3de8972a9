"""One training job for every engine: `python -m tests.scaling.training ENGINE CASE...` prints losses and weights.

In a process of its own, since the number of devices is fixed when a process starts, and since two strategies on the
CPU of one process get in each other's way. The backend by KERAS_BACKEND.
"""

import contextlib
import json
import sys
from typing import Any, NamedTuple

import keras
import numpy as np

import keras_xent as kx
from tests.internals import set_sizes

# For the environment of the process: its devices on JAX.
XLA_FLAGS = "--xla_force_host_platform_device_count=4"
CLASSES, FEATURES, TOKENS, BATCH = 62, 8, 12, 4
# Valid tokens of the rows, four rows a batch: with two devices one of them has nothing in the first two batches, with
# four devices two; nothing at all is valid in the fourth.
VALID = (12, 2, 0, 0, 0, 0, 7, 5, 12, 0, 2, 0, 0, 0, 0, 0, 3, 12, 1, 6)
EPOCHS = 2


class Case(NamedTuple):
    """A model, how it is trained, and with what."""

    head: str = "LogitsDense"
    policy: str = "float32"
    options: dict[str, Any] = {}
    sample_weight: bool = False
    # Rows of the last batch, if it is not a whole one.
    last: int = BATCH
    # In how many micro-batches a batch is computed.
    micro_batches: int = 1


ALL_OPTIONS = {
    "label_smoothing": 0.1,
    "class_weight": list(np.linspace(0.25, 3, CLASSES)),
    "z_loss": 1e-3,
    "logit_softcap": 5.0,
}
CASES = {
    "fused": Case(),
    "dense": Case("Dense"),
    "tied": Case("TiedLogits"),
    "fused, all options": Case(options=ALL_OPTIONS, sample_weight=True),
    "dense, all options": Case("Dense", options=ALL_OPTIONS, sample_weight=True),
    "fused, sequence_mean": Case(options={"reduction": "sequence_mean"}),
    "dense, normalizer": Case("Dense", options={"normalizer": 14.0}),
    "fused, bfloat16": Case(policy="mixed_bfloat16", options=ALL_OPTIONS, sample_weight=True),
    "dense, bfloat16": Case("Dense", policy="mixed_bfloat16", options=ALL_OPTIONS, sample_weight=True),
    "fused, last batch": Case(last=2),
    "dense, last batch": Case("Dense", last=2),
    "fused, accumulated": Case(options=ALL_OPTIONS, sample_weight=True, micro_batches=2),
    "dense, accumulated, last batch": Case("Dense", last=3, micro_batches=2),
}


def data(last=BATCH):
    """Padded tokens, labels, and weights of the sequences."""
    rng = np.random.default_rng(10)
    tokens = np.where(np.arange(TOKENS) < np.array(VALID)[:, None], rng.integers(1, CLASSES, (len(VALID), TOKENS)), 0)
    labels = np.where(tokens > 0, rng.integers(1, CLASSES, tokens.shape), 0)
    rows = len(VALID) - BATCH + last
    return tokens[:rows], labels[:rows], rng.uniform(0.1, 2, len(VALID))[:rows]


def model_of(case):
    """The compiled model; the same weights on every engine."""
    keras.utils.set_random_seed(11)
    inputs = keras.Input((TOKENS,), dtype="int32")
    if case.head == "TiedLogits":
        embedding = kx.layers.TiedLogits(CLASSES, FEATURES, name="logits", dtype=case.policy)
        hidden = embedding(inputs)
    else:
        hidden = keras.layers.Embedding(CLASSES, FEATURES, mask_zero=True, dtype=case.policy)(inputs)
    hidden = keras.layers.Dense(FEATURES, activation="tanh", dtype=case.policy)(hidden)
    if case.head == "TiedLogits":
        logits = embedding(hidden, reverse=True)
    else:
        head = keras.layers.Dense if case.head == "Dense" else kx.layers.LogitsDense
        logits = head(CLASSES, name="logits", dtype=case.policy)(hidden)
    model = keras.Model(inputs, logits)
    softcap = case.options.get("logit_softcap")
    groups = {"groups": ["low", "high"], "group_of": lambda labels: labels > CLASSES // 2}
    metrics = [
        kx.metrics.Perplexity(ignore_class=0, logit_softcap=softcap, **groups),
        kx.metrics.TokenAccuracy(ignore_class=0),
    ]
    loss = kx.losses.MaskedSequenceCrossentropy(ignore_class=0, **case.options)
    model.compile(keras.optimizers.SGD(0.5), loss, metrics=metrics)
    return model


def trained(case):
    """History, evaluation and weights after the training."""
    model = kx.accumulate_gradients(model_of(case), case.micro_batches)
    tokens, labels, weights = data(case.last)
    # JAX gives each device as many rows as the others: there what is missing has to be padding.
    missing = -len(tokens) % BATCH if keras.distribution.distribution() else 0
    tokens, labels = (np.pad(array, ((0, missing), (0, 0))) for array in (tokens, labels))
    weights = np.pad(weights, (0, missing)) if case.sample_weight else None
    history = model.fit(tokens, labels, BATCH, EPOCHS, sample_weight=weights, shuffle=False, verbose=0).history
    evaluated = model.evaluate(tokens, labels, batch_size=BATCH, sample_weight=weights, verbose=0, return_dict=True)
    shards = {}
    if keras.backend.backend() == "jax":
        shards = {w.path: len({tuple(map(str, s.index)) for s in w.value.addressable_shards}) for w in model.weights}
    return {
        "history": history,
        "evaluated": evaluated,
        "weights": [w.astype("float64").tolist() for w in model.get_weights()],
        "shards": shards,
    }


def _mirrored(devices):
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(devices)]).scope()


def _data_parallel(devices):
    return keras.distribution.DataParallel(devices=keras.distribution.list_devices("cpu")[:devices]).scope()


def _model_parallel(batch, model):
    devices = keras.distribution.list_devices("cpu")[: batch * model]
    mesh = keras.distribution.DeviceMesh((batch, model), ("batch", "model"), devices)
    layout = keras.distribution.LayoutMap(mesh)
    for path, axes in kx.layers.vocabulary_layout("logits", "model").items():
        layout[path] = axes
    return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch").scope()


ENGINES = {
    "one device": contextlib.nullcontext,
    "MirroredStrategy, 2": lambda: _mirrored(2),
    "MirroredStrategy, 4": lambda: _mirrored(4),
    "DataParallel, 2": lambda: _data_parallel(2),
    "DataParallel, 4": lambda: _data_parallel(4),
    "ModelParallel, 1 x 2": lambda: _model_parallel(1, 2),
    "ModelParallel, 2 x 2": lambda: _model_parallel(2, 2),
}


def main(engine, *names):
    # No number of tokens is a multiple of the chunks, and the loop over them runs several times.
    set_sizes(setattr, fewest_rows=5, chunk_bytes=1)
    with ENGINES[engine]():
        print(json.dumps({name: trained(CASES[name]) for name in names}))


if __name__ == "__main__":
    main(*sys.argv[1:])
