"""Keras callbacks that log perplexity, validate within an epoch, and report losses that jump."""

import keras

from keras_xent._elsewhere import attribute_error
from keras_xent.callbacks.perplexity_logger import PerplexityLogger
from keras_xent.callbacks.spike_detector import SpikeDetector
from keras_xent.callbacks.tensorboard import TensorBoard
from keras_xent.callbacks.training_statistics import TrainingStatistics
from keras_xent.callbacks.validate_every import ValidateEvery

__all__ = ["PerplexityLogger", "SpikeDetector", "TensorBoard", "TrainingStatistics", "ValidateEvery"]


def __getattr__(name: str) -> None:
    raise attribute_error("callbacks", name, keras.callbacks)
