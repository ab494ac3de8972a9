"""Steps of whole models, with our losses, heads, metrics and callbacks, or with Keras'; on either backend.

A peer is named by what its model has: "Keras", or "ours", "ours, head", "ours, head, Perplexity, TokenAccuracy".
"""

import functools
import os
import tempfile
from collections.abc import Callable

import keras
import numpy as np

import keras_xent as kx
from keras_xent.kernels._compiled import clear_cache

IGNORED = -1


def peer(name: str, case: dict) -> Callable:
    """One of the peers. What its first call takes includes compiling the step."""
    questions = {"callbacks": _of_callbacks, "first_epoch": _of_epochs, "later_epoch": _of_epochs}
    return questions.get(case["question"], _of_steps)(name, case)


def _of_steps(name, case):
    keras.utils.set_random_seed(0)
    body = {"transformer": _transformer, "head_fit": _perceptron, "metrics": _embedding}[case["model"]]
    model = body(case, _head(name))
    x, y = _tokens(case, case["batch"])
    evaluate = case["question"] == "evaluate"

    @functools.cache
    def compiled():
        # Metrics are made only here: one that is alive has every loss that is compiled count hits.
        model.compile(
            keras.optimizers.Adam() if case["model"] != "metrics" else "sgd",
            _loss(name),
            metrics=_metrics(name),
            jit_compile=True if case.get("jit") else "auto",
        )
        return model.test_on_batch if evaluate else model.train_on_batch

    # The same program as in `fit` and `evaluate`.
    return lambda: {"loss": np.float32(compiled()(x, y, return_dict=True)["loss"])}


def repeated(call: Callable, steps: int) -> Callable:
    """A call that makes so many calls; the benchmark divides its time by them."""

    def calls():
        for _ in range(steps - 1):
            call()
        return call()

    calls.steps = steps
    return calls


def _of_epochs(name, case):
    """Epochs of batches of different lengths: the first of a model that is made for it, or later ones of one model."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    batches = [rng.integers(0, case["classes"], (2, case["batch"], length), "int32") for length in case["lengths"]]
    tokens = tf.TensorSpec([case["batch"], None], "int32")
    data = tf.data.Dataset.from_generator(lambda: map(tuple, batches), output_signature=(tokens, tokens))
    data = _without_autotuning(data)

    def model():
        keras.utils.set_random_seed(0)
        ours = kx.layers.LogitsDense if case["head"] else keras.layers.Dense
        head = keras.layers.Dense if name == "Keras" else ours
        inputs = keras.Input((None,), dtype="int32")
        hidden = keras.layers.Embedding(case["classes"], case["features"])(inputs)
        made = keras.Model(inputs, head(case["classes"])(hidden))
        sparse = keras.losses.SparseCategoricalCrossentropy if name == "Keras" else _ours_of_lengths(case["head"])
        made.compile("sgd", sparse(from_logits=True))
        return made

    def epoch(model):
        return {"loss": np.float32(model.fit(data, verbose=0).history["loss"][-1])}

    if case["question"] == "later_epoch":
        return functools.partial(epoch, model())

    def first():
        # Programs of earlier models are freed.
        keras.backend.clear_session()
        clear_cache()
        return epoch(model())

    return first


def _without_autotuning(dataset):
    """The dataset for `fit`. In TensorFlow 2.21 some epochs wait for tf.data's autotuning thread, with any loss."""
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def _ours_of_lengths(head):
    return kx.losses.MaskedSequenceCrossentropy if head else kx.losses.SparseCategoricalCrossentropy


def _head(name):
    return kx.layers.LogitsDense if "head" in name else keras.layers.Dense


def _loss(name):
    if name.startswith("Keras"):
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=IGNORED)
    return kx.losses.MaskedSequenceCrossentropy(ignore_class=IGNORED)


def _metrics(name):
    names = [part for part in name.split(", ") if hasattr(kx.metrics, part)]
    if names and name.startswith("Keras"):
        import keras_hub

        # No label is ignored in these cases, which Keras' accuracy could not.
        return [keras_hub.metrics.Perplexity(from_logits=True), keras.metrics.SparseCategoricalAccuracy()]
    return [getattr(kx.metrics, one)(ignore_class=IGNORED, name=f"{one}_{i}") for i, one in enumerate(names)]


def _tokens(case, examples):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, case["classes"], (2, examples, case["length"]), "int32")
    return x, np.where(rng.random(y.shape) < case.get("valid", 1.0), y, np.int32(IGNORED))


def _embedding(case, head):
    tokens = keras.Input((case["length"],), dtype="int32")
    hidden = keras.layers.Embedding(case["classes"], case["features"])(tokens)
    return keras.Model(tokens, head(case["classes"])(hidden))


def _perceptron(case, head):
    tokens = keras.Input((case["length"],), dtype="int32")
    hidden = keras.layers.Embedding(case["classes"], case["features"])(tokens)
    hidden = keras.layers.Dense(case["features"], activation="gelu")(hidden)
    return keras.Model(tokens, head(case["classes"])(hidden))


def _transformer(case, head):
    features = case["features"]
    tokens = keras.Input((case["length"],), dtype="int32")
    hidden = keras.layers.Embedding(case["classes"], features)(tokens)
    hidden = hidden + keras.layers.Embedding(case["length"], features)(keras.ops.arange(case["length"]))
    for _ in range(2):
        normal = keras.layers.LayerNormalization()(hidden)
        hidden = hidden + keras.layers.MultiHeadAttention(4, features // 4)(normal, normal, use_causal_mask=True)
        inner = keras.layers.Dense(4 * features, activation="gelu")(keras.layers.LayerNormalization()(hidden))
        hidden = hidden + keras.layers.Dense(features)(inner)
    return keras.Model(tokens, head(case["classes"])(keras.layers.LayerNormalization()(hidden)))


def _of_callbacks(name, case):
    """Whole calls of `fit` with a callback: "ours, TensorBoard, batch", "PerplexityLogger, 50" or "no callback"."""
    keras.utils.set_random_seed(0)
    model = _embedding(case, kx.layers.LogitsDense)
    x, y = _tokens(case, case["batch"] * case["steps"])
    folder = tempfile.TemporaryDirectory()
    every = {"every batch": 1, "every 50 batches": 50, "every epoch": "epoch"}.get(name.partition(", ")[2])
    if name == "no callback":
        callbacks = []
    elif name.startswith("Keras"):
        callbacks = [keras.callbacks.TensorBoard(folder.name, update_freq=every)]
    elif name.startswith("TensorBoard"):
        callbacks = [kx.callbacks.TensorBoard(folder.name, update_freq=every)]
    else:
        callbacks = [kx.callbacks.PerplexityLogger(os.path.join(folder.name, "log.csv"), update_freq=every)]
    model.compile("adam", _loss("ours"), metrics=[kx.metrics.Perplexity(ignore_class=IGNORED)])

    batches = {"x": x, "y": y, "batch_size": case["batch"], "shuffle": False}
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        batches = {"x": _without_autotuning(tf.data.Dataset.from_tensor_slices((x, y)).batch(case["batch"]))}

    def fit():
        history = model.fit(**batches, verbose=0, callbacks=callbacks)
        return {"loss": np.float32(history.history["loss"][-1])}

    fit.steps, fit.folder = case["steps"], folder
    return fit
