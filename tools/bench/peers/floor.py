"""The cost of the memory traffic or the matmuls alone: programs that do only the necessary work.

Two programs are called, as by a loss. For arrays that stay in the caches that is most of the time: there the floor is
the cost of the calls, and not of the memory.
"""

from collections.abc import Callable

import tensorflow as tf


def traffic(logits: tf.Tensor, targets: tf.Tensor | None) -> Callable[[], tf.Tensor]:
    """Forward, a read of the logits; backward, another and a write.

    Targets as large as the logits, which the sparse loss does not have, are read as often.
    """
    read = [_floats(t) for t in (logits, targets) if t is not None]

    def run():
        _read(*read)
        return _read_and_write(*read)

    return run


def _floats(tensor):
    """As many bytes of float32, with which XLA is quickest; what they mean does not matter."""
    rows, columns = tensor.shape
    return tf.ones([rows, columns * tensor.dtype.size // 4])


@tf.function(jit_compile=True, autograph=False)
def _read(*tensors):
    return sum(tf.reduce_sum(t, axis=1) for t in tensors)


@tf.function(jit_compile=True, autograph=False)
def _read_and_write(written, *others):
    # Targets may have more bytes than the logits: then several of their columns go into one.
    columns = [c for t in others for c in tf.split(t, t.shape[1] // written.shape[1], axis=1)]
    return sum(columns, 2.0 * written)


def three_matmuls(hidden: tf.Tensor, kernel: tf.Tensor) -> Callable[[], tf.Tensor]:
    """Logits, and the two products with as many numbers that are the gradients; by TensorFlow's own kernels."""

    @tf.function(autograph=False)
    def run():
        # Both gradients wait for the logits, as in a loss.
        logits = hidden @ kernel
        for_hidden = tf.matmul(logits, kernel, transpose_b=True)
        # All of them, or TensorFlow would leave out what is not used.
        return for_hidden, tf.matmul(hidden, logits, transpose_a=True)

    return run


def four_matmuls(arrays: dict[str, tf.Tensor]) -> Callable[[], tf.Tensor]:
    """The same three, and the logits of a teacher."""
    three = three_matmuls(arrays["hidden"], arrays["kernel"])
    teacher = one_matmul(arrays["teacher_hidden"], arrays["teacher_kernel"])
    return lambda: (teacher(), three())


def one_matmul(hidden: tf.Tensor, kernel: tf.Tensor) -> Callable[[], tf.Tensor]:
    """The logits alone."""
    return tf.function(lambda: hidden @ kernel, autograph=False)
