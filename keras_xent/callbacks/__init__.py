"""Keras callbacks that log what cross-entropy means."""

from keras_xent.callbacks.tensorboard import TensorBoard

__all__ = ["TensorBoard"]
