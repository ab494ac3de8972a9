"""Pure, compiled kernels: tensors in, numbers of each token or example out, and no state."""

from keras_xent._named_arguments import serializable
from keras_xent.kernels.distillation import linear_distillation
from keras_xent.kernels.linear import LossStatistics, linear_cross_entropy
from keras_xent.kernels.sequence_loss import linear_sequence_loss
from keras_xent.kernels.sigmoid import sigmoid_cross_entropy
from keras_xent.kernels.soft_targets import linear_softmax_cross_entropy
from keras_xent.kernels.softmax import softmax_cross_entropy
from keras_xent.kernels.sparse_softmax import sparse_softmax_cross_entropy
from keras_xent.kernels.token_statistics import TokenStatistics, linear_token_statistics
from keras_xent.kernels.top_k import TopK, linear_top_k
from keras_xent.kernels.top_k_distillation import linear_top_k_distillation

__all__ = [
    "LossStatistics",
    "TokenStatistics",
    "TopK",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_sequence_loss",
    "linear_softmax_cross_entropy",
    "linear_token_statistics",
    "linear_top_k",
    "linear_top_k_distillation",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "sparse_softmax_cross_entropy",
]

# A model compiled with one of them as its loss is loaded with it.
for _kernel in (linear_cross_entropy, sigmoid_cross_entropy, softmax_cross_entropy, sparse_softmax_cross_entropy):
    serializable(_kernel)
del _kernel
