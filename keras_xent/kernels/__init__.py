"""Pure, compiled cross-entropy kernels: tensors in, losses in nats out, nothing reduced, no state."""

from keras_xent.kernels.linear import linear_cross_entropy
from keras_xent.kernels.sigmoid import sigmoid_cross_entropy
from keras_xent.kernels.softmax import softmax_cross_entropy
from keras_xent.kernels.sparse_softmax import sparse_softmax_cross_entropy

__all__ = ["linear_cross_entropy", "sigmoid_cross_entropy", "softmax_cross_entropy", "sparse_softmax_cross_entropy"]
