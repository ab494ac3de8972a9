"""Options, inputs and shorthands for the tests of the softmax kernels."""

import numpy as np

from keras_xent.kernels import softmax_cross_entropy, sparse_softmax_cross_entropy
from tests import facts
from tests.backend import (
    TWO_MODES,
)

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"class_weight": [0.5, 2.0, 0.0, 1.5, 1.0, 3.0, 0.25]},
    "smoothing and weights": {"label_smoothing": 0.3, "class_weight": [0.5, 2.0, 0.0, 1.5, 1.0, 3.0, 0.25]},
    "focal": {"focal_gamma": 2.0},
    "focal below 1": {"focal_gamma": 0.5},
    "focal and smoothing": {"focal_gamma": 1.5, "label_smoothing": 0.2},
    "z-loss": {"z_loss": 0.1},
    "softcap": {"logit_softcap": 3.0},
    "all": {
        "label_smoothing": 0.1,
        "class_weight": [0.5, 2.0, 0.5, 1.5, 1.0, 3.0, 0.25],
        "focal_gamma": 1.5,
        "z_loss": 0.01,
        "logit_softcap": 5.0,
    },
}
INF, NAN = float("inf"), float("nan")
IN_ONE_PROGRAM = ("all", TWO_MODES[1])


def example(seed=0, rows=16, classes=7, scale=2.0):
    rng = np.random.default_rng(seed)
    logits = scale * rng.standard_normal((rows, classes))
    labels = rng.integers(0, classes, rows)
    upstream = rng.uniform(-1, 2, rows)
    return labels, logits, upstream


def sparse(labels, **options):
    return lambda logits: sparse_softmax_cross_entropy(labels, logits, **options)


def dense(targets, **options):
    return lambda logits: softmax_cross_entropy(targets, logits, **options)


def one_hot(labels, classes=facts.CLASSES):
    return np.eye(classes, dtype="float32")[labels]


def soft_targets(seed, shape):
    targets = np.random.default_rng(seed).dirichlet(np.full(shape[-1], 0.3), shape[:-1])
    return targets.reshape(shape)
