"""Keras metrics that say what cross-entropy means."""

from keras_xent.metrics.perplexity import Perplexity
from keras_xent.metrics.token_accuracy import TokenAccuracy

__all__ = ["Perplexity", "TokenAccuracy"]
