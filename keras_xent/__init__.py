"""Cross-entropy for Keras: losses, kernels, metrics, callbacks and deployment."""

from keras_xent import callbacks, config, deploy, distillation, kernels, layers, losses, metrics, preference
from keras_xent.accumulation import accumulate_gradients
from keras_xent.calibration import calibrate
from keras_xent.layers import fuse_head
from keras_xent.log_probs import sequence_log_probs, sequence_loss, token_log_probs
from keras_xent.packing import segment_weights
from keras_xent.top_k_log_probs import top_k_log_probs

__version__ = "0.1.0"

__all__ = [
    "accumulate_gradients",
    "calibrate",
    "callbacks",
    "config",
    "deploy",
    "distillation",
    "fuse_head",
    "kernels",
    "layers",
    "losses",
    "metrics",
    "preference",
    "segment_weights",
    "sequence_log_probs",
    "sequence_loss",
    "token_log_probs",
    "top_k_log_probs",
]


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
