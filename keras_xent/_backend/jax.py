"""The backend's functions on JAX."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import keras

from keras_xent._backend._jax_accumulation import accumulating_step as accumulating_step
from keras_xent._backend._jax_endings import traced_ending as traced_ending
from keras_xent._backend._jax_gradients import clear_programs as clear_programs
from keras_xent._backend._jax_gradients import custom_gradient as custom_gradient
from keras_xent._backend._jax_gradients import fused_gradient as fused_gradient
from keras_xent._backend._jax_gradients import is_eager as is_eager
from keras_xent._backend._jax_gradients import is_traced as is_traced
from keras_xent._backend._jax_gradients import jit as jit
from keras_xent._backend._jax_gradients import with_gradient_of_sum as with_gradient_of_sum
from keras_xent._backend._jax_gradients import with_slope as with_slope
from keras_xent._backend._jax_judging import judged_step as judged_step
from keras_xent._backend._jax_mesh import is_inside_shard_map, vary_alike
from keras_xent._backend._jax_mesh import on_any_mesh as on_any_mesh
from keras_xent._backend._jax_program import is_concrete as is_concrete
from keras_xent._backend._jax_program import one_program as one_program
from keras_xent._backend._jax_program import reads_variables_once as reads_variables_once
from keras_xent._backend._jax_program import starts_programs as starts_programs
from keras_xent._backend._jax_rows import pad_to_bucket as pad_to_bucket
from keras_xent._backend._jax_rows import take_rows as take_rows
from keras_xent._backend._jax_rows import with_rounded_rows as with_rounded_rows
from keras_xent._backend._jax_tracers import let_tracers_keep as let_tracers_keep
from keras_xent._backend._jax_tracers import note_beside as note_beside
from keras_xent._types import Function, Tensor

NAME = "jax"
# The loss runs inside `value_and_grad` and the metrics outside, on other tracers.
METRICS_SEE_PREDICTIONS_OF_LOSS = False
# See `kernels/_xla_cpu.py`.
XLA_CPU_FUSES_SLICED_SUMS = False


def no_autograph(function: Function) -> Function:
    """`function`."""
    return function


def snapshot(variable: Tensor) -> Tensor:
    """The present value of a variable, as a tensor that later assignments do not change; a tensor is returned as is."""
    return keras.ops.convert_to_tensor(variable)


def widest_int() -> str:
    """The widest integer dtype: JAX has no int64 unless `jax_enable_x64` is set."""
    return str(jax.dtypes.canonicalize_dtype("int64"))


def asserts_in_graph() -> bool:
    """False: a program of JAX cannot raise."""
    return False


def assert_in_graph(condition: Tensor, data: list | Callable[[], list], tensor: Tensor = None) -> Tensor:
    """`tensor`: a program of JAX cannot raise."""
    return tensor


def in_xla() -> bool:
    """False: JAX traces a program inside another once for all its uses."""
    return False


def sums_pairwise() -> bool:
    """False: XLA:CPU adds one number after the other."""
    return False


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent. That of `keras.ops` computes float64 in float32."""
    return jax.numpy.tanh(x)


def matmul(a: Tensor, b: Tensor, *, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    """The product of two matrices of one dtype; products of 16-bit floats are accumulated in float32."""
    contracted = ((0 if transpose_a else 1,), (1 if transpose_b else 0,))
    accumulator = "float64" if a.dtype == "float64" else "float32"
    return jax.lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=accumulator)


def fori_loop(stop: Any, body: Callable, state: Any) -> Any:
    """`state` after `body(i, state)` for i = 0, 1, ..., stop - 1."""
    if is_inside_shard_map():
        state = vary_alike(state, jax.eval_shape(body, 0, state))
    return jax.lax.fori_loop(0, stop, body, state)


def gradient_of_sum(function: Callable, x: Tensor) -> Tensor:
    """The gradient of `sum(function(x))`, inside a compiled program too."""
    return jax.grad(lambda x: jax.numpy.sum(function(x)))(x)


def opaque(value: Tensor) -> Tensor:
    """The value, of which a compiled program knows nothing before it runs."""
    return jax.lax.optimization_barrier(jax.numpy.asarray(value))


def update_rows(array: Tensor, start: Any, rows: Tensor) -> Tensor:
    """The array with `rows` in place of its own from `start` on."""
    return jax.lax.dynamic_update_slice(array, rows, (start, *[0] * (array.ndim - 1)))


def take_at_columns(array: Tensor, columns: Tensor) -> Tensor:
    """The numbers of `array` at the indices `columns` along axis 1; both have the same other axes."""
    return keras.ops.take_along_axis(array, columns, axis=1)


def add_at_columns(array: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """`[n, V]` with `values` `[n, K]` added at `columns` `[n, K]`; those that come twice are added twice."""
    return array.at[jax.numpy.arange(array.shape[0])[:, None], columns].add(values)


def set_at_columns(array: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """`[n, V]` with `values` `[n, 1]` in place of the numbers at `columns` `[n, 1]`."""
    return array.at[jax.numpy.arange(array.shape[0])[:, None], columns].set(values)


def scale_or_zero(array: Tensor, factor: Tensor) -> Tensor:
    """`array * factor`, 0 where the factor is 0 even if the array is NaN."""
    # The factor is that 0: on a GPU, XLA 0.11 makes an array of the constant where another has the same shape, 2.1 GB
    # beside the gradient of the kernel of Llama 3.
    return jax.numpy.where(factor == 0, factor, array * factor).astype(array.dtype)


def bitcast(array: Tensor, dtype: str) -> Tensor:
    """The bits of the array, read as another dtype of the same width."""
    return jax.lax.bitcast_convert_type(array, dtype)


def round_to_bfloat16(x: Tensor) -> Tensor:
    """`x` in bfloat16, rounded to nearest even."""
    return x.astype("bfloat16")


@functools.cache
def on_accelerator() -> bool:
    """Returns whether programs run on a GPU or TPU, or on several devices, rather than on the one CPU."""
    return jax.default_backend() != "cpu" or jax.device_count() > 1


def on_tpu() -> bool:
    """Returns whether programs run on a TPU."""
    return jax.default_backend() == "tpu"


class BatchMesh(NamedTuple):
    """The devices of a step, and the name of the axis along which a batch is sharded over them."""

    mesh: Any
    axis: str


def batch_mesh(array: Tensor) -> BatchMesh | None:
    """The devices over which Keras shards the rows of an array evenly; None if there are none.

    None too for concrete values, which may be one device's or one process's own, and inside `jax.shard_map`, where each
    device has its own rows already.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or is_eager(array) or is_inside_shard_map():
        return None
    mesh, axis = distribution.device_mesh.backend_mesh, distribution.batch_dim_name
    if axis not in mesh.axis_names:
        return None
    rows, devices = array.shape[0], mesh.shape[axis]
    return BatchMesh(mesh, axis) if devices > 1 and isinstance(rows, int) and rows % devices == 0 else None


def is_partitioned(array: Tensor) -> bool:
    """Returns whether the array's type names its sharding: an Explicit axis of a mesh, kept at every step."""
    spec = getattr(getattr(jax.typeof(array), "sharding", None), "spec", None) if hasattr(jax, "typeof") else None
    return spec is not None and any(axis is not None for axis in spec)


def shard_map_rows(mesh: BatchMesh | None, function: Callable, rows: Any, replicated: Any, *, has_rows: Any) -> Any:
    """`function(rows, replicated)`, on each device for the rows that it has; without a mesh simply that.

    Left to itself XLA moves rows between devices wherever their order changes, and where a loop takes a few at a time
    it has all devices compute the same ones.

    `rows` are arrays with a row for each of the batch; `replicated` are arrays that each device has, whole or in parts
    that XLA divides further. `has_rows` says of each result, in the same structure, whether it has rows: the others
    have to be sums over the devices, made by `psum`.
    """
    if mesh is None:
        return function(rows, replicated)
    sharded, whole = jax.sharding.PartitionSpec(mesh.axis), jax.sharding.PartitionSpec()
    return jax.shard_map(
        function,
        mesh=mesh.mesh,
        in_specs=(sharded, whole),
        out_specs=jax.tree.map(lambda rows: sharded if rows else whole, has_rows),
        axis_names={mesh.axis},
        check_vma=False,
    )(rows, replicated)


def psum(mesh: BatchMesh | None, value: Tensor) -> Tensor:
    """The sum of the devices' values, inside `shard_map_rows`."""
    return value if mesh is None or value is None else jax.lax.psum(value, mesh.axis)


def pmax(mesh: BatchMesh | None, value: Tensor) -> Tensor:
    """The largest of the devices' values, inside `shard_map_rows`."""
    return value if mesh is None else jax.lax.pmax(value, mesh.axis)


def num_replicas() -> int:
    """1: a program of JAX sees the data of all devices as one array."""
    return 1


def all_reduce_sum(value: Tensor) -> Tensor:
    """`value`, which is the sum over all devices already."""
    return value


def with_value_of_all_replicas(value: Tensor) -> Tensor:
    """`value`, which is that of all devices already."""
    return value


def to_numpy(variable: Any) -> Any:
    """The value of a variable."""
    return keras.ops.convert_to_numpy(variable.value)


def operation_of(tensor: Tensor) -> None:
    """None: tensors of JAX do not know what made them."""
    return None


def constant_of(tensor: Tensor) -> None:
    """None: programs of JAX are not looked into."""
    return None


def program_of(tensor: Tensor) -> Any:
    """The trace that a tensor belongs to (`_trace`); None for an array, which belongs to none."""
    return getattr(tensor, "_trace", None)
