"""Pure, compiled cross-entropy kernels: tensors in, losses in nats out, nothing reduced and nothing remembered."""

import keras

from keras_xent.kernels.linear import linear_cross_entropy
from keras_xent.kernels.sigmoid import sigmoid_cross_entropy
from keras_xent.kernels.softmax import softmax_cross_entropy
from keras_xent.kernels.sparse_softmax import sparse_softmax_cross_entropy

__all__ = ["linear_cross_entropy", "sigmoid_cross_entropy", "softmax_cross_entropy", "sparse_softmax_cross_entropy"]

# A model compiled with one of them as its loss is loaded with it.
for _kernel in (linear_cross_entropy, sigmoid_cross_entropy, softmax_cross_entropy, sparse_softmax_cross_entropy):
    keras.saving.register_keras_serializable(package="keras_xent")(_kernel)
del _kernel
