"""Where a graph of TensorFlow runs, and what it asserts."""

import functools
from collections.abc import Callable

import tensorflow as tf

from keras_xent._backend._xla import uses_xla
from keras_xent._types import Tensor


def in_xla() -> bool:
    """Whether what is traced now is part of a program of XLA."""
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None:
        context = graph._get_control_flow_context()
        while context is not None:
            if context.IsXLAContext():
                return True
            context = context.outer_context
        graph = getattr(graph, "outer_graph", None)
    return False


@functools.cache
def on_accelerator() -> bool:
    """Whether programs run on a GPU or TPU."""
    return any(device.device_type != "CPU" for device in tf.config.list_logical_devices())


def assert_in_graph(condition: Tensor, data: Callable[[], list], tensor: Tensor = None) -> Tensor:
    """`tensor`, which a graph on the CPU computes only after it has asserted the condition; `data` is what is told.

    On an accelerator nothing is asserted: it would cost a transfer at every step. XLA drops assertions.
    """
    if on_accelerator() or in_xla():
        return tensor

    if not uses_xla():
        # What is exported: not every runtime has branches that assert.
        assertion = tf.debugging.Assert(condition, data(), summarize=1)
        return tensor if tensor is None or assertion is None else _after(assertion, tensor)

    def fail():
        tf.debugging.Assert(False, data(), summarize=1)
        return False

    # What is told is computed where it is needed: in the branch.
    assertion = tf.cond(condition, lambda: True, fail)
    return None if tensor is None else _after(assertion, tensor)


def _after(assertion, tensor):
    with tf.control_dependencies([assertion]):
        return tf.identity(tensor)


def sums_pairwise() -> bool:
    """Whether a sum of many numbers is made of sums of parts here, and so loses few digits."""
    return not in_xla()
