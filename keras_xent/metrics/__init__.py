"""Keras metrics of language models and classifiers: perplexity, bits per byte, accuracy, calibration, entropy."""

import keras

from keras_xent._elsewhere import attribute_error
from keras_xent.metrics.bits_per_byte import BitsPerByte
from keras_xent.metrics.byte_lengths import bytes_of_tokens
from keras_xent.metrics.calibration_error import CalibrationError
from keras_xent.metrics.entropy import Entropy
from keras_xent.metrics.perplexity import Perplexity
from keras_xent.metrics.token_accuracy import TokenAccuracy
from keras_xent.metrics.token_crossentropy import TokenCrossentropy

__all__ = [
    "BitsPerByte",
    "CalibrationError",
    "Entropy",
    "Perplexity",
    "TokenAccuracy",
    "TokenCrossentropy",
    "bytes_of_tokens",
]


def __getattr__(name: str) -> None:
    raise attribute_error("metrics", name, keras.metrics)
