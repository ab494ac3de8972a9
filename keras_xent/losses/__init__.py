"""Serializable Keras losses, and the functions of the same names."""

import keras

from keras_xent._elsewhere import attribute_error
from keras_xent.losses.binary import BinaryCrossentropy
from keras_xent.losses.binary_focal import BinaryFocalCrossentropy
from keras_xent.losses.categorical import CategoricalCrossentropy
from keras_xent.losses.categorical_focal import CategoricalFocalCrossentropy
from keras_xent.losses.distillation import Distillation
from keras_xent.losses.functions import (
    binary_crossentropy,
    binary_focal_crossentropy,
    categorical_crossentropy,
    categorical_focal_crossentropy,
    kl_divergence,
    sparse_categorical_crossentropy,
)
from keras_xent.losses.kl_divergence import KLDivergence
from keras_xent.losses.masked_sequence import MaskedSequenceCrossentropy
from keras_xent.losses.sparse_categorical import SparseCategoricalCrossentropy

__all__ = [
    "BinaryCrossentropy",
    "BinaryFocalCrossentropy",
    "CategoricalCrossentropy",
    "CategoricalFocalCrossentropy",
    "Distillation",
    "KLDivergence",
    "MaskedSequenceCrossentropy",
    "SparseCategoricalCrossentropy",
    "binary_crossentropy",
    "binary_focal_crossentropy",
    "categorical_crossentropy",
    "categorical_focal_crossentropy",
    "kl_divergence",
    "sparse_categorical_crossentropy",
]


def __getattr__(name: str) -> None:
    raise attribute_error("losses", name, keras.losses)
