"""One table of the losses: arguments, none of them at its default, and inputs that fit."""

import inspect

import numpy as np

import keras_xent as kx

# By their short names.
Binary = kx.losses.BinaryCrossentropy
Categorical = kx.losses.CategoricalCrossentropy
Sparse = kx.losses.SparseCategoricalCrossentropy
Sequence = kx.losses.MaskedSequenceCrossentropy
LOW_PRECISION = ("bfloat16", "float16")

# The rest of the family has tests/losses/test_family.py.
NAMES = sorted(
    ["BinaryCrossentropy", "CategoricalCrossentropy", "MaskedSequenceCrossentropy", "SparseCategoricalCrossentropy"]
)
DROP_INS = ("BinaryCrossentropy", "CategoricalCrossentropy", "SparseCategoricalCrossentropy")
# The losses of one distribution over the classes.
SOFTMAX = tuple(name for name in NAMES if name != "BinaryCrossentropy")
SPARSE = ("MaskedSequenceCrossentropy", "SparseCategoricalCrossentropy")

CLASSES = 5
CLASS_WEIGHT = [1.0, 0.5, 2.0, 0.25, 3.0]

# Every argument of every loss, each at a value that is not its default.
ARGUMENTS = {
    "BinaryCrossentropy": {
        "from_logits": True,
        "label_smoothing": 0.1,
        "axis": 1,
        "reduction": "token_mean",
        "name": "answers",
        "dtype": "float64",
        "pos_weight": CLASS_WEIGHT,
        "focal_gamma": 1.5,
        "focal_alpha": 0.3,
        "ignore_class": -1,
    },
    "CategoricalCrossentropy": {
        "from_logits": True,
        "label_smoothing": 0.1,
        "axis": 1,
        "reduction": "sequence_mean",
        "name": "teacher",
        "dtype": "bfloat16",
        "class_weight": CLASS_WEIGHT,
        "focal_gamma": 1.5,
        "z_loss": 1e-3,
        "logit_softcap": 3.0,
    },
    "MaskedSequenceCrossentropy": {
        "from_logits": False,
        "ignore_class": 0,
        "label_smoothing": 0.1,
        "class_weight": CLASS_WEIGHT,
        "z_loss": 1e-3,
        "logit_softcap": 3.0,
        "normalizer": 7.0,
        "reduction": "sequence_mean",
        "name": "tokens",
        "dtype": "float16",
    },
    "SparseCategoricalCrossentropy": {
        "from_logits": True,
        "ignore_class": 0,
        "reduction": "mean_with_sample_weight",
        "axis": 1,
        "name": "pixels",
        "dtype": "float64",
        "label_smoothing": 0.1,
        "class_weight": CLASS_WEIGHT,
        "focal_gamma": 1.5,
        "z_loss": 1e-3,
        "logit_softcap": 3.0,
    },
}


def arguments(name, **changes):
    """All options of a loss that change its values, on logits, over the last axis; then `changes`."""
    options = dict(ARGUMENTS[name])
    for argument in ("axis", "name", "dtype", "reduction", "normalizer"):
        options.pop(argument, None)
    return {**options, "from_logits": True, **changes}


def formula(options):
    """The options by which the losses themselves are computed."""
    return {k: v for k, v in options.items() if k not in ("from_logits", "reduction", "normalizer")}


def make(loss, **options):
    """The loss of that name."""
    return getattr(kx.losses, loss)(**options)


def parameters(name):
    """The constructor's parameters by name."""
    return dict(inspect.signature(getattr(kx.losses, name)).parameters)


def example(name, shape=(4, 3), *, axis=-1, seed=0, missing=True):
    """Labels, and float32 logits with the class axis at `axis`, for losses of `shape`; some labels are missing.

    The first element always has a label, the last one none, for losses that know missing labels.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2.0, size=(*shape, CLASSES)).astype("float32")
    if name == "BinaryCrossentropy":
        labels = rng.integers(-1 if missing else 0, 2, size=logits.shape)
        labels[(0,) * len(shape)] = 1
        if missing:
            labels[(-1,) * len(shape)] = -1
    elif name == "CategoricalCrossentropy":
        labels = rng.dirichlet(np.ones(CLASSES), size=shape).astype("float32")
    else:
        labels = rng.integers(0 if missing else 1, CLASSES, size=shape)
        labels[(0,) * len(shape)] = 1
        if missing:
            labels[(-1,) * len(shape)] = 0
        return labels, np.moveaxis(logits, -1, axis)
    return np.moveaxis(labels, -1, axis), np.moveaxis(logits, -1, axis)
