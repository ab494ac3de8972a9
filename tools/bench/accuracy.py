"""Errors of the outputs of a float32 head, against the same formulas in float64 NumPy."""

import keras
import numpy as np
from keras import ops

import keras_xent as kx


def errors(hidden: np.ndarray, kernel: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Of log-probability, entropy and log-sum-exp and of their gradients in float32, against float64 formulas."""
    h, k = hidden.astype("float64"), kernel.astype("float64")
    logits = h @ k
    top = logits.max(axis=1, keepdims=True)
    logsumexp = top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    log_p = logits - logsumexp
    p, one_hot = np.exp(log_p), np.eye(k.shape[1])[labels]
    entropy = -(p * log_p).sum(axis=1, keepdims=True)
    values = {"log_prob": (one_hot * log_p).sum(1), "entropy": entropy[:, 0], "logsumexp": logsumexp[:, 0]}
    d_logits = {"log_prob": one_hot - p, "entropy": -p * (log_p + entropy), "logsumexp": p}
    found = kx.kernels.linear_token_statistics(hidden, kernel, labels)
    errors = {}
    for name, value in values.items():
        errors[name] = _error(getattr(found, name), value)
        gradients = _gradients(name, hidden, kernel, labels)
        errors[f"{name}, gradient for hidden"] = _error(gradients[0], d_logits[name] @ k.T)
        errors[f"{name}, gradient for kernel"] = _error(gradients[1], h.T @ d_logits[name])
    return errors


def _gradients(name, hidden, kernel, labels):
    def total(hidden, kernel):
        return ops.sum(getattr(kx.kernels.linear_token_statistics(hidden, kernel, labels), name))

    arrays = ops.convert_to_tensor(hidden), ops.convert_to_tensor(kernel)
    if keras.backend.backend() == "jax":
        import jax

        return jax.grad(total, (0, 1))(*arrays)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(arrays)
        value = total(*arrays)
    return tape.gradient(value, arrays)


def _error(found, expected):
    return float(np.abs(ops.convert_to_numpy(found) - expected).max() / np.abs(expected).max())
