"""Keras callbacks that log what cross-entropy means."""

from keras_xent.callbacks.perplexity_logger import PerplexityLogger
from keras_xent.callbacks.spike_detector import SpikeDetector
from keras_xent.callbacks.tensorboard import TensorBoard
from keras_xent.callbacks.training_statistics import TrainingStatistics
from keras_xent.callbacks.validate_every import ValidateEvery

__all__ = ["PerplexityLogger", "SpikeDetector", "TensorBoard", "TrainingStatistics", "ValidateEvery"]
