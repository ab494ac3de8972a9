"""Keras metrics that say what cross-entropy means."""

from keras_xent.metrics.perplexity import Perplexity

__all__ = ["Perplexity"]
