"""Cross-entropy for Keras: losses, kernels, metrics and callbacks."""

from keras_xent import callbacks, kernels, losses, metrics

__version__ = "0.1.0"

__all__ = ["callbacks", "kernels", "losses", "metrics"]
