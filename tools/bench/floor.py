"""What the memory alone costs: programs that read and write what a loss must, and no more.

Two programs are called, as by a loss. For arrays that stay in the caches that is most of the time: there the floor is
the cost of the calls, and not of the memory.
"""

from collections.abc import Callable

import tensorflow as tf


def traffic(labels: tf.Tensor, logits: tf.Tensor) -> Callable[[], tf.Tensor]:
    """Forward, a read of the logits; backward, another and a write.

    Targets as large as the logits, which the sparse loss does not have, are read as often.
    """
    read = [_floats(t) for t in (logits, labels) if t.shape.rank == logits.shape.rank]

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
