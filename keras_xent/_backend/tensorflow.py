"""The backend's functions on TensorFlow."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla
from tensorflow.python.framework.op_callbacks import should_invoke_op_callbacks

from keras_xent._backend._tensorflow_accumulation import accumulating_step as accumulating_step
from keras_xent._backend._tensorflow_gradients import clear_programs as clear_programs
from keras_xent._backend._tensorflow_gradients import custom_gradient as custom_gradient
from keras_xent._backend._tensorflow_gradients import fused_gradient as fused_gradient
from keras_xent._backend._tensorflow_gradients import is_eager as is_eager
from keras_xent._backend._tensorflow_gradients import jit as jit
from keras_xent._backend._tensorflow_gradients import with_gradient_of_sum as with_gradient_of_sum
from keras_xent._backend._tensorflow_gradients import with_slope as with_slope
from keras_xent._backend._tensorflow_graph import assert_in_graph as assert_in_graph
from keras_xent._backend._tensorflow_graph import asserts_in_graph as asserts_in_graph
from keras_xent._backend._tensorflow_graph import in_xla as in_xla
from keras_xent._backend._tensorflow_graph import is_traced as is_traced
from keras_xent._backend._tensorflow_graph import on_accelerator as on_accelerator
from keras_xent._backend._tensorflow_graph import on_tpu as on_tpu
from keras_xent._backend._tensorflow_graph import sums_pairwise as sums_pairwise
from keras_xent._backend._tensorflow_judging import judged_step as judged_step
from keras_xent._backend._tensorflow_program import is_concrete as is_concrete
from keras_xent._backend._tensorflow_program import one_program as one_program
from keras_xent._backend._tensorflow_program import reads_variables_once as reads_variables_once
from keras_xent._backend._tensorflow_program import starts_programs as starts_programs
from keras_xent._backend._tensorflow_rows import pad_to_bucket as pad_to_bucket
from keras_xent._backend._tensorflow_rows import take_rows as take_rows
from keras_xent._backend._tensorflow_rows import with_rounded_rows as with_rounded_rows
from keras_xent._backend._xla import obstacles, uses_xla
from keras_xent._types import Function, Tensor

NAME = "tensorflow"
# A training step hands one tensor of predictions to the loss and, after the optimizer, to the metrics.
METRICS_SEE_PREDICTIONS_OF_LOSS = True
# See `kernels/_xla_cpu.py`.
XLA_CPU_FUSES_SLICED_SUMS = True

# Operations that pass a probability on unchanged. StopGradient is not among them: the logits before it would train what
# somebody froze.
_TRANSPARENT = {"Cast", "Identity"}

# Nothing is compiled where functions run eagerly, and XLA refuses the operations that a debugger adds
# (`tf.debugging.enable_check_numerics`, Debugger V2).
obstacles += [tf.config.functions_run_eagerly, should_invoke_op_callbacks]


def no_autograph(function: Function) -> Function:
    """`function`, kept from AutoGraph, which rewrites everything that a user's `tf.function` calls."""
    return tf.autograph.experimental.do_not_convert(function)


def snapshot(variable: Tensor) -> Tensor:
    """The present value of a variable, as a tensor that later assignments do not change; a tensor is returned as is."""
    # Of a variable Keras gives the `tf.Variable` itself, which a metric would read after the optimizer has changed it.
    return tf.convert_to_tensor(keras.ops.convert_to_tensor(variable))


def widest_int() -> str:
    """The widest integer dtype."""
    return "int64"


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent."""
    return tf.tanh(x)


def matmul(a: Tensor, b: Tensor, *, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    """The product of two matrices of one dtype; products of 16-bit floats are accumulated in float32."""
    accumulator = tf.float64 if a.dtype == tf.float64 else tf.float32
    return tf.raw_ops.BatchMatMulV3(x=a, y=b, Tout=accumulator, adj_x=transpose_a, adj_y=transpose_b)


def fori_loop(stop: Any, body: Callable, state: Any) -> Any:
    """`state` after `body(i, state)` for i = 0, 1, ..., stop - 1."""

    def step(i, state):
        return i + 1, body(i, state)

    # Outside of XLA ten iterations would run at once, and hold the logits of each in memory.
    return tf.while_loop(lambda i, state: i < stop, step, (0, state), parallel_iterations=1)[1]


def gradient_of_sum(function: Callable, x: Tensor) -> Tensor:
    """The gradient of `sum(function(x))`, inside a compiled program too."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return tape.gradient(value, x, unconnected_gradients="zero")


def opaque(value: Tensor) -> Tensor:
    """The value, of which a compiled program knows nothing before it runs."""
    value = tf.convert_to_tensor(value)
    return xla.optimization_barrier(value)[0] if uses_xla() else value


def update_rows(array: Tensor, start: Any, rows: Tensor) -> Tensor:
    """The array with `rows` in place of its own from `start` on."""
    if uses_xla():
        return keras.ops.slice_update(array, (start, *[0] * (len(array.shape) - 1)), rows)
    # The former is an operation of XLA.
    indices = start + tf.range(tf.shape(rows)[0])
    return tf.tensor_scatter_nd_update(array, indices[:, None], rows)


def take_at_columns(array: Tensor, columns: Tensor) -> Tensor:
    """The numbers of `array` at the indices `columns` along axis 1; both have the same other axes."""
    # The gradient of `tf.gather` has a transposition that XLA cannot compile in the second derivative of a loop.
    return tf.reshape(tf.gather_nd(array, _places(columns)), tf.shape(columns))


def add_at_columns(array: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """`[n, V]` with `values` `[n, K]` added at `columns` `[n, K]`; those that come twice are added twice."""
    return tf.tensor_scatter_nd_add(array, _places(columns), tf.reshape(values, (-1,)))


def set_at_columns(array: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """`[n, V]` with `values` `[n, 1]` in place of the numbers at `columns` `[n, 1]`."""
    return tf.tensor_scatter_nd_update(array, _places(columns), tf.reshape(values, (-1,)))


def _places(columns):
    """`[number of columns, axes]`: the indices of the numbers at the indices `columns` along axis 1.

    Made in one way, so that XLA finds that those of equal columns are equal: each is a kernel to compile, of 1 to 2 MB.
    """
    shape, rank = tf.shape(columns), len(columns.shape)
    ranges = [tf.reshape(tf.range(shape[i]), [-1 if i == axis else 1 for axis in range(rank)]) for i in range(rank)]
    indices = [tf.cast(columns, "int32") if i == 1 else tf.broadcast_to(r, shape) for i, r in enumerate(ranges)]
    return tf.stack([tf.reshape(one, (-1,)) for one in indices], axis=-1)


def scale_or_zero(array: Tensor, factor: Tensor) -> Tensor:
    """`array * factor`, 0 where the factor is 0 even if the array is NaN."""
    # One operation, which writes to the memory of the array where nothing else needs it.
    return tf.math.multiply_no_nan(array, factor)


def bitcast(array: Tensor, dtype: str) -> Tensor:
    """The bits of the array, read as another dtype of the same width."""
    return tf.bitcast(array, dtype)


def round_to_bfloat16(x: Tensor) -> Tensor:
    """float32 `x` in bfloat16, rounded to nearest even by its bits. See `kernels/_xla_cpu.py` for the reason."""

    @tf.custom_gradient
    def by_bits(x):
        bits, half = tf.bitcast(x, "uint32"), tf.constant(16, "uint32")
        odd = tf.bitwise.right_shift(bits, half) & 1
        # The payload of a NaN must not be carried over into the sign.
        bits = tf.where(tf.math.is_nan(x), bits | 0x400000, bits + 0x7FFF + odd)
        upper = tf.cast(tf.bitwise.right_shift(bits, half), "uint16")
        return tf.bitcast(upper, "bfloat16"), lambda upstream: tf.cast(upstream, x.dtype)

    return by_bits(x)


def on_any_mesh(function: Function) -> Function:
    """`function`: types of TensorFlow do not name a mesh."""
    return function


def batch_mesh(array: Tensor) -> None:
    """None: on TensorFlow each replica has its own rows."""
    return None


def is_partitioned(array: Tensor) -> bool:
    """False: types of TensorFlow do not say it."""
    return False


def shard_map_rows(mesh: None, function: Callable, rows: Any, replicated: Any, *, has_rows: Any) -> Any:
    """`function(rows, replicated)`."""
    return function(rows, replicated)


def psum(mesh: None, value: Tensor) -> Tensor:
    """`value`: there is one device."""
    return value


def pmax(mesh: None, value: Tensor) -> Tensor:
    """`value`: there is one device."""
    return value


def num_replicas() -> int:
    """Among how many replicas of `tf.distribute` a batch is divided. Keras adds up their gradients."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of the replicas' values; `value` outside of replicas, where the caller has all the data."""
    replica = _replica()
    return value if replica is None else replica.all_reduce(tf.distribute.ReduceOp.SUM, value)


def with_value_of_all_replicas(value: Tensor) -> Tensor:
    """The mean of the replicas' values, with the gradient of this replica's own value."""
    if _replica() is None:
        return value
    mean = all_reduce_sum(value) / num_replicas()

    @tf.custom_gradient
    def of_all(value):
        return tf.identity(mean), lambda upstream: upstream

    return of_all(value)


def _replica():
    return tf.distribute.get_replica_context() if num_replicas() > 1 else None


def to_numpy(variable: Any) -> Any:
    """The value of a variable. `ops.convert_to_numpy` takes several times as long, seen in each step."""
    value = variable.value
    # `numpy` of a variable copies twice: the variable to a tensor, and that to an array.
    return (value.value() if callable(getattr(value, "value", None)) else value).numpy()


def let_tracers_keep(name: str, note: Callable[[], Any]) -> None:
    """Nothing: tensors take any attribute."""


def note_beside(tensor: Tensor, name: str) -> Any:
    """None: nothing is noted."""
    return None


def operation_of(tensor: Tensor) -> Any:
    """The operation of a graph that made the tensor, seen through casts; None in eager mode."""
    if is_eager(tensor) or hasattr(tensor, "assign"):
        return None
    # A ragged tensor has none.
    operation = getattr(tensor, "op", None)
    while operation is not None and operation.type in _TRANSPARENT:
        operation = operation.inputs[0].op
    return operation


def constant_of(tensor: Tensor) -> Any:
    """The value of a tensor that a graph holds as a constant; None where it does not."""
    return tf.get_static_value(tensor)


def program_of(tensor: Tensor) -> Any:
    """The graph that a tensor belongs to; None for a variable, which belongs to none."""
    return getattr(tensor, "graph", None)


def traced_ending(tensor: Tensor) -> None:
    """None: the operations of a graph say more, see `operation_of`."""
    return None
