"""Properties of a TensorFlow graph: its device, XLA, and its assertions."""

import functools
import re
from collections.abc import Callable

import tensorflow as tf
from tensorflow.python.eager.forwardprop_util import pack_tangents

from keras_xent._backend._xla import uses_xla
from keras_xent._types import Tensor


def is_traced() -> bool:
    """Whether operations are part of a program now."""
    return not tf.executing_eagerly()


def in_xla() -> bool:
    """Returns whether the graph that is traced now is part of a program of XLA."""
    for graph in _graphs():
        context = graph._get_control_flow_context()
        while context is not None:
            if context.IsXLAContext():
                return True
            context = context.outer_context
    return False


def in_branch_of_xla() -> bool:
    """Whether what is traced now is a branch of a condition in a program of XLA.

    There TensorFlow 2.21 aborts the process over a program inside the program (`tf.switch_case` with `jit_compile`).
    """
    return in_xla() and _is_inside("CondBranchFuncGraph")


def in_control_flow() -> bool:
    """Whether what is traced now is a part of a condition or a loop."""
    return _is_inside("ControlFlowFuncGraph")


def _is_inside(kind):
    """Whether a graph of this class is traced now, or one within it."""
    return any(one.__name__ == kind for graph in _graphs() for one in type(graph).__mro__)


def _graphs():
    """The graph that is traced now, the one that it is a part of, and so on."""
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None:
        yield graph
        graph = getattr(graph, "outer_graph", None)


def has_tangents(*tensors: Tensor) -> bool:
    """Whether forward mode (`tf.autodiff.ForwardAccumulator`) watches one of these."""
    return bool(pack_tangents(tensors).tangents)


@functools.cache
def on_accelerator() -> bool:
    """Returns whether programs run on a GPU or TPU."""
    return any(device.device_type != "CPU" for device in tf.config.list_logical_devices())


def on_tpu() -> bool:
    """Returns whether programs run on a TPU."""
    return any(device.device_type == "TPU" for device in tf.config.list_logical_devices())


def asserts_in_graph() -> bool:
    """Returns whether `assert_in_graph` asserts anything here.

    Not on an accelerator, where it would cost a transfer at every step; XLA drops assertions.
    """
    return not (on_accelerator() or in_xla())


def assert_in_graph(condition: Tensor, data: list | Callable[[], list], tensor: Tensor = None) -> Tensor:
    """`tensor`, which a graph on the CPU computes only after it has asserted the condition; `data` is its message.

    A message that is a function is computed only where it is raised.
    """
    if not asserts_in_graph():
        return tensor
    # What is exported runs without XLA: not every runtime has branches that assert.
    if isinstance(data, list) or not uses_xla():
        assertion = _assert(condition, data if isinstance(data, list) else data())
    else:
        assertion = tf.cond(condition, lambda: True, lambda: _fail(data()))
    return tensor if tensor is None or assertion is None else _after(assertion, tensor)


def _fail(message):
    # The message is computed in this branch, and so only where it is raised.
    _assert(False, message)
    return False


def _assert(condition, message):
    # The error begins with the name of the node, and its message comes after two pages of stack.
    with tf.name_scope(re.sub(r"[^A-Za-z0-9]+", "_", message[0]).strip("_")):
        # Not `tf.debugging.Assert`, which makes a function of it, called in every step.
        return tf.raw_ops.Assert(condition=condition, data=list(map(tf.convert_to_tensor, message)), summarize=1)


def _after(assertion, tensor):
    with tf.control_dependencies([assertion]):
        return tf.identity(tensor)


def sums_pairwise() -> bool:
    """Returns whether a sum of many numbers is computed from sums of parts here, and so loses few digits."""
    return not in_xla()
