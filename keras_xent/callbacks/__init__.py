"""Keras callbacks that log what cross-entropy means."""

from keras_xent.callbacks.perplexity_logger import PerplexityLogger
from keras_xent.callbacks.tensorboard import TensorBoard
from keras_xent.callbacks.validate_every import ValidateEvery

__all__ = ["PerplexityLogger", "TensorBoard", "ValidateEvery"]
