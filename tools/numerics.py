"""Prints the table of docs/numerics.md: where Keras and this package give different answers, and which is right.

    python tools/numerics.py

Each row computes what it shows, with the installed Keras, on the TensorFlow backend.
"""

import os
import warnings

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_xent as kx

NAN, INF = float("nan"), float("inf")


def loss(function, y_true, y_pred, sample_weight=None, mask=None):
    y_pred = tf.convert_to_tensor(y_pred)
    if mask is not None:
        y_pred._keras_mask = tf.constant(mask)
    return function(y_true, y_pred, sample_weight)


def gradient(function, y_true, y_pred):
    y_pred = tf.convert_to_tensor(y_pred)
    with tf.GradientTape() as tape:
        tape.watch(y_pred)
        value = function(y_true, y_pred)
    return tape.gradient(value, y_pred)


def softmax_head(losses, policy, **arguments):
    """The loss of a softmax layer that is wrong by 30 nats, and its kernel after one step."""
    inputs = keras.Input((1,))
    layer = keras.layers.Dense(2, activation="softmax", dtype=policy, use_bias=False)
    model = keras.Model(inputs, layer(inputs))
    layer.kernel.assign([[0.0, 30.0]])
    optimizer = keras.optimizers.SGD(1.0)
    model.compile(optimizer, losses.SparseCategoricalCrossentropy(**arguments))
    value = model.train_on_batch(np.ones((1, 1)), np.zeros((1, 1)))
    return [float(value), *np.array(layer.kernel).reshape(-1)]


def saved(losses, **arguments):
    made = losses.SparseCategoricalCrossentropy(**arguments)
    return keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(made))


def labeled(losses, label, classes, dtype):
    logits = np.zeros((1, classes), "float32")
    logits[0, label] = 20
    return loss(losses.SparseCategoricalCrossentropy(from_logits=True, dtype=dtype), np.array([label]), logits)


def sparse(losses, **arguments):
    return losses.SparseCategoricalCrossentropy(from_logits=True, **arguments)


def dense(losses, **arguments):
    return losses.CategoricalCrossentropy(from_logits=True, **arguments)


def binary(losses, **arguments):
    return losses.BinaryCrossentropy(**arguments)


SQUARE = np.log(np.arange(1, 19).reshape(3, 3, 2)).astype("float32")
ONES = np.ones((3, 3), int)
ROW = np.array([[0.1, 2.1, 1.1]], "float32")

# What is asked; how to ask a package's losses; the right answer.
ROWS = [
    (
        'Label 257 of 300 with `dtype="bfloat16"`, logit 20 on it',
        lambda k: labeled(k, 257, 300, "bfloat16"),
        "6.2e-07",
    ),
    (
        'Label 2049 of 2100 with `dtype="float16"`, logit 20 on it',
        lambda k: labeled(k, 2049, 2100, "float16"),
        "4.3e-06",
    ),
    (
        "Softmax layer under `mixed_bfloat16`, wrong by 30 nats: loss, and kernel [0, 30] after a step of 1",
        lambda k: softmax_head(k, "mixed_bfloat16"),
        "30, 1, 29",
    ),
    (
        "The same in float32 with `ignore_class=-1`",
        lambda k: softmax_head(k, "float32", ignore_class=-1),
        "30, 1, 29",
    ),
    (
        "Binary, bare probabilities [0, 1, 0, 1] for labels [0, 1, 1, 0]: gradient",
        lambda k: 4 * gradient(binary(k), np.array([0.0, 1.0, 1.0, 0.0]), np.array([0, 1, 0, 1], "float32")),
        "not 0 where wrong",
    ),
    (
        'Binary, probability 1 for label 1, `dtype="float16"`',
        lambda k: binary(k, dtype="float16")(np.ones((1, 1)), np.array([[1.0]], "float32")),
        "0",
    ),
    (
        "Binary logits [inf, -inf, inf, -inf] for labels [1, 0, 0, 1]",
        lambda k: binary(k, from_logits=True, reduction=None)(
            np.array([[1.0], [0], [0], [1]], "float32"), np.array([[INF], [-INF], [INF], [-INF]], "float32")
        ),
        "0, 0, inf, inf",
    ),
    (
        "Dense, logits [0, -inf, 1], target [1, 0, 0]",
        lambda k: dense(k)(np.eye(3, dtype="float32")[:1], np.array([[0, -INF, 1]], "float32")),
        "1.3133",
    ),
    (
        "Dense, target row of zeros: gradient",
        lambda k: gradient(dense(k), np.zeros((1, 3), "float32"), ROW),
        "0, 0, 0",
    ),
    (
        "Dense, target [2, 0, 0]: gradient",
        lambda k: gradient(dense(k), np.array([[2, 0, 0]], "float32"), ROW),
        "-1.82, 1.33, 0.489",
    ),
    (
        "Dense, `label_smoothing=0.3, axis=1`, 3 equal logits",
        lambda k: dense(k, label_smoothing=0.3, axis=1)(
            np.eye(3)[:, :, None][:1].repeat(2, 2), np.zeros((1, 3, 2), "float32")
        ),
        "1.0986",
    ),
    (
        "Sparse, class axis 1",
        lambda k: sparse(k, axis=1)(np.zeros((1, 2), int), np.zeros((1, 3, 2), "float32")),
        "1.0986",
    ),
    (
        "Weights [1, 2, 3] of three examples with three time steps",
        lambda k: loss(sparse(k), ONES, SQUARE, np.array([1.0, 2.0, 3.0], "float32")),
        "1.2625",
    ),
    (
        "`mean_with_sample_weight`, three steps of loss 1.0986 each, weight 1 for the one example as [1, 1]",
        lambda k: sparse(k, reduction="mean_with_sample_weight")(
            np.zeros((1, 3), int), np.zeros((1, 3, 3), "float32"), np.ones((1, 1), "float32")
        ),
        "1.0986",
    ),
    (
        "NaN under the mask, log 2 elsewhere",
        lambda k: loss(
            sparse(k), np.zeros((1, 2), int), np.array([[[0, 0], [NAN, 0]]], "float32"), mask=[[True, False]]
        ),
        "0.6931",
    ),
    (
        "NaN under weight 0, log 2 elsewhere (sum)",
        lambda k: sparse(k, reduction="sum")(
            np.zeros(2, int), np.array([[0, 0], [NAN, 0]], "float32"), np.array([1.0, 0.0])
        ),
        "0.6931",
    ),
    (
        'Mean of 70,000 losses of log 2, `dtype="float16"`',
        lambda k: sparse(k, dtype="float16")(np.zeros(70_000, int), np.zeros((70_000, 2), "float32")),
        "0.6931",
    ),
    (
        "Label 1.7",
        lambda k: sparse(k)(np.array([1.7], "float32"), np.zeros((1, 3), "float32")),
        "error",
    ),
    (
        "Binary labels -1 and 2, probability 0.5 each",
        lambda k: binary(k)(np.array([[-1, 2]]), np.array([[0.5, 0.5]], "float32")),
        "error",
    ),
    (
        "Labels as a list: `loss([0], ...)`",
        lambda k: sparse(k)([0], tf.zeros((1, 3))),
        "1.0986",
    ),
    (
        "Mask [B, T] on a binary output [B, T], log 2 each",
        lambda k: loss(
            binary(k, from_logits=True),
            np.zeros((2, 3), "float32"),
            np.zeros((2, 3), "float32"),
            mask=[[True, False, True], [True, True, False]],
        ),
        "0.6931",
    ),
    (
        'Empty batch, `reduction="sum"`: shape of the loss',
        lambda k: str(tuple(sparse(k, reduction="sum")(np.zeros(0, int), np.zeros((0, 3), "float32")).shape)),
        "()",
    ),
    ('`dtype="float64"` after saving and loading', lambda k: saved(k, dtype="float64").dtype, "float64"),
    (
        "`axis=1` of the sparse loss, in its configuration",
        lambda k: str(sparse(k, axis=1).get_config().get("axis", "forgotten")),
        "1",
    ),
]


def answer(ask, losses):
    try:
        value = ask(losses)
    except Exception as error:  # an error of any kind is the answer
        return type(error).__name__
    if isinstance(value, str):
        return value
    return ", ".join(
        f"{x + 0.0:.3g}" if abs(x) >= 1e3 or abs(x) < 1e-3 else f"{x:.5g}"
        for x in np.array(value, "float64").reshape(-1)
    )


def table():
    """The lines of the table."""
    yield "| case | Keras | keras_xent | right |"
    yield "|---|---|---|---|"
    for case, ask, right in ROWS:
        yield f"| {case} | {answer(ask, keras.losses)} | {answer(ask, kx.losses)} | {right} |"


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(*table(), sep="\n")
    print(f"\nPrinted with Keras {keras.__version__} and TensorFlow {tf.__version__}.")
