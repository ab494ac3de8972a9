"""The peers that run on TensorFlow: our losses and Keras', in a graph and under XLA, `tf.nn`, and the floors.

"Graph" is what `fit` makes of a model on the CPU: no `jit_compile`, and shapes that differ share a graph.
"""

import functools
import importlib.metadata
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

import keras_xent
from keras_xent.kernels._compiled import clear_cache
from tools.bench import data
from tools.bench.peers import floor, outputs, scoring, training

CLASSES = {
    "sigmoid": "BinaryCrossentropy",
    "dense": "CategoricalCrossentropy",
    "sparse": "SparseCategoricalCrossentropy",
}


def peer(name: str, case: dict, folder: str) -> Callable:
    """One of the peers, ready to be called."""
    questions = {
        "loss": _of_loss,
        "linear": _of_head,
        "new_shape": _of_new_shapes,
        "lengths": _of_lengths,
        "graph": _of_graph,
        "eager": _of_eager,
        "first_call": _of_first_calls,
        "uneven": _of_uneven_sizes,
        "score": scoring.peer,
        **dict.fromkeys(outputs.QUESTIONS, _of_output),
    }
    of = questions.get(case["question"])
    return of(name, case, folder) if of else training.peer(name, case)


def arrays(results: dict) -> dict:
    """As NumPy arrays, in float32."""
    return {name: np.asarray(tf.cast(value, "float32")) for name, value in results.items()}


def versions() -> dict:
    """Of the packages."""
    there = [n for n in ("tensorflow", "keras", "numpy", "keras-hub") if any(importlib.metadata.distributions(name=n))]
    return {name: importlib.metadata.version(name) for name in there}


def forget() -> None:
    """Frees inputs and programs."""
    _inputs.cache_clear()
    clear_cache()
    keras.backend.clear_session()


@functools.lru_cache(1)
def _inputs(folder, names, dtype):
    return tuple(_tensor(data.read(folder, name), dtype) for name in names)


def _tensor(stored, dtype):
    tensor = tf.constant(np.array(stored))
    return tf.bitcast(tensor, dtype) if tensor.dtype == tf.uint16 else tensor


def _loss(peer, case):
    """`(given, logits) -> loss`, where labels or targets are given."""
    kind, smoothing = case["loss"], case["smoothing"]
    dense_by_labels = kind == "sparse" and smoothing and peer != "ours"
    if dense_by_labels:
        # Keras 3.15 and tf.nn smooth dense targets only.
        kind = "dense"
    if peer == "tf.nn":
        loss = functools.partial(_by_tf_nn, kind, smoothing)
    else:
        package = keras_xent.losses if peer == "ours" else keras.losses
        options = {"label_smoothing": smoothing} if smoothing else {}
        loss = getattr(package, CLASSES[kind])(from_logits=True, **options)
    if dense_by_labels:
        return lambda labels, logits: loss(tf.one_hot(labels, case["classes"]), logits)
    return loss


def _by_tf_nn(kind, smoothing, given, logits):
    if kind == "sparse":
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(given, logits)
    elif kind == "dense":
        given = given * (1.0 - smoothing) + smoothing / logits.shape[1] if smoothing else given
        losses = tf.nn.softmax_cross_entropy_with_logits(tf.cast(given, logits.dtype), logits)
    else:
        given = given * (1.0 - smoothing) + smoothing / 2.0 if smoothing else given
        losses = tf.nn.sigmoid_cross_entropy_with_logits(tf.cast(given, logits.dtype), logits)
    return tf.reduce_mean(tf.cast(losses, "float32"))


def _of_loss(name, case, folder):
    given, logits = _inputs(folder, ("labels" if case["loss"] == "sparse" else "targets", "logits"), case["dtype"])
    if name == "floor":
        return _floor(floor.traffic(logits, None if case["loss"] == "sparse" else given))
    step = _step(_loss(name.partition(",")[0], case), name)
    return _done(lambda: dict(zip(("loss", "gradient"), step(given, logits), strict=True)))


def _step(loss, name):
    def step(given, logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            value = loss(given, logits)
        return value, tape.gradient(value, logits)

    return _compiled(step, name)


def _compiled(step, name):
    if name.endswith("XLA"):
        return tf.function(step, jit_compile=True, autograph=False)
    return tf.function(step, autograph=False, reduce_retracing=True)


def _done(call):
    def run():
        results = call()
        # TensorFlow returns from a program on the CPU when all its results are there, unless an option says otherwise.
        assert tf.config.experimental.get_synchronous_execution()
        results["loss"].numpy()
        return results

    return run


def _floor(call):
    def run():
        call()
        return {}

    return run


def _of_head(name, case, folder):
    hidden, kernel, labels = _inputs(folder, ("hidden", "kernel", "labels"), case["dtype"])
    training_ = case.get("gradients", True)
    if name == "floor":
        # Tokens that do not count need no product.
        rows = hidden[: round(case["valid"] * case["rows"])]
        return _floor((floor.three_matmuls if training_ else floor.one_matmul)(rows, kernel))

    valid = labels != data.IGNORED
    linear, sparse = keras_xent.kernels.linear_cross_entropy, keras_xent.losses.SparseCategoricalCrossentropy
    keras_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=data.IGNORED)
    ours_of_logits = sparse(from_logits=True, ignore_class=data.IGNORED)

    def by_tf_nn(hidden, kernel):
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(labels, 0), hidden @ kernel)
        return tf.reduce_sum(tf.where(valid, losses, 0.0)) / tf.reduce_sum(tf.cast(valid, "float32"))

    loss = {
        "ours": lambda hidden, kernel: linear(
            hidden, kernel, labels, ignore_class=data.IGNORED, reduction="token_mean", training=training_
        ),
        "ours, logits": lambda hidden, kernel: ours_of_logits(labels, hidden @ kernel),
        "Keras": lambda hidden, kernel: keras_loss(labels, hidden @ kernel),
        "tf.nn": by_tf_nn,
    }[name.removesuffix(", XLA").removesuffix(", graph")]

    def step(hidden, kernel):
        with tf.GradientTape() as tape:
            tape.watch([hidden, kernel])
            value = loss(hidden, kernel)
        return value, *(tape.gradient(value, [hidden, kernel]) if training_ else ())

    step = _compiled(step, name)
    return _done(lambda: dict(zip(("loss", "hidden", "kernel"), step(hidden, kernel), strict=False)))


def _of_output(name, case, folder):
    """Other losses of a head: results by name, as those of a step."""
    names = data.names(folder)
    arrays = dict(zip(names, _inputs(folder, names, case["dtype"]), strict=True))
    if name == "floor":
        return _floor(floor.four_matmuls(arrays))
    loss, trained = outputs.peer(name, case)

    def step(arrays):
        inputs = {name: arrays[name] for name in trained}
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value, more = loss(arrays | inputs)
        return {"loss": value, **more, **tape.gradient(value, inputs)}

    step = _compiled(step, name)
    return _done(lambda: step(arrays))


def _of_graph(name, case, folder):
    """A call that knows how many operations its graph has."""
    step = _step(_loss(name.partition(",")[0], {**case, "smoothing": 0.0}), name)
    labels = tf.TensorSpec([None], "int32") if case["loss"] == "sparse" else tf.TensorSpec([None, case["classes"]])
    graph = step.get_concrete_function(labels, tf.TensorSpec([None, case["classes"]])).graph

    def call():
        return {}

    call.operations = len(graph.get_operations())
    return call


def _of_eager(name, case, folder):
    """Steps outside of a graph."""
    given, logits = map(tf.constant, data.eager(case))
    loss = _loss(name, {**case, "smoothing": 0.0})

    def step():
        with tf.GradientTape() as tape:
            tape.watch(logits)
            value = loss(given, logits)
        return {"loss": value, "gradient": tape.gradient(value, logits)}

    return training.repeated(_done(step), case["steps"])


def _of_first_calls(name, case, folder):
    """Each call traces and compiles anew: nothing of an earlier one is left."""
    given, logits = _given_and_logits(case, case["rows"])
    labels = tf.TensorSpec([None, *given.shape[1:]], given.dtype)

    def call():
        clear_cache()
        step = _step(_loss(name.partition(",")[0], {**case, "smoothing": 0.0}), name)
        program = step.get_concrete_function(labels, tf.TensorSpec([None, case["classes"]]))
        return dict(zip(("loss", "gradient"), program(given, logits), strict=True))

    return _done(call)


def _of_uneven_sizes(name, case, folder):
    """A new graph, and steps whose masks leave a different number of rows each time."""
    given, logits = _given_and_logits(case, case["rows"])
    sizes = np.random.default_rng(0).permutation(case["rows"])[: case["sizes"]]
    masks = [tf.constant(np.arange(case["rows"]) < size) for size in sizes]

    def call():
        clear_cache()
        loss = _loss(name.partition(",")[0], {**case, "smoothing": 0.0})
        step = _step(lambda mask, x: loss(tf.boolean_mask(given, mask), tf.boolean_mask(x, mask)), name)
        for mask in masks:
            results = step(mask, logits)
        return dict(zip(("loss", "gradient"), results, strict=True))

    return _done(call)


def _of_new_shapes(name, case, folder):
    """No two calls have the same number of rows."""
    return _varying(name, case, case.get("lengths", range(64, 640)))


def _of_lengths(name, case, folder):
    """The calls of steps with a few lengths, in turn."""
    lengths = np.random.default_rng(0).permutation(case["lengths"])
    return _varying(name, case, np.resize(lengths, case["steps"]).tolist())


def _varying(name, case, numbers):
    """Calls with these numbers of rows."""
    given, logits = _given_and_logits(case, max(numbers))
    rows = iter(numbers)
    step = _step(_loss(name.partition(",")[0], {**case, "smoothing": 0.0}), name)

    def call():
        n = next(rows)
        return dict(zip(("loss", "gradient"), step(given[:n], logits[:n]), strict=True))

    return _done(call)


def _given_and_logits(case, rows):
    rng, classes = np.random.default_rng(0), case["classes"]
    logits = tf.constant(rng.standard_normal((rows, classes), "float32"))
    given = rng.integers(0, classes, rows, "int32")
    if case["loss"] != "sparse":
        given = rng.random((rows, classes), "float32")
        given = np.round(given) if case["loss"] == "sigmoid" else given / given.sum(axis=1, keepdims=True)
    return tf.constant(given), logits
