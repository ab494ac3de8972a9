"""Serializable Keras losses."""

from keras_xent.losses.binary import BinaryCrossentropy
from keras_xent.losses.categorical import CategoricalCrossentropy
from keras_xent.losses.distillation import Distillation
from keras_xent.losses.masked_sequence import MaskedSequenceCrossentropy
from keras_xent.losses.sparse_categorical import SparseCategoricalCrossentropy

__all__ = [
    "BinaryCrossentropy",
    "CategoricalCrossentropy",
    "Distillation",
    "MaskedSequenceCrossentropy",
    "SparseCategoricalCrossentropy",
]
