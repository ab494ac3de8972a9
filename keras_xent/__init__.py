"""Cross-entropy for Keras: losses, kernels, metrics and callbacks."""

from keras_xent import callbacks, kernels, layers, losses, metrics
from keras_xent.layers import fuse_head

__version__ = "0.1.0"

__all__ = ["callbacks", "fuse_head", "kernels", "layers", "losses", "metrics"]
