"""Keras callbacks that log what cross-entropy means."""

from keras_xent.callbacks.perplexity_logger import PerplexityLogger
from keras_xent.callbacks.tensorboard import TensorBoard

__all__ = ["PerplexityLogger", "TensorBoard"]
