"""What JAX does its own way."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import keras
import numpy

from keras_xent._backend._finite import where_finite
from keras_xent._types import Tensor

NAME = "jax"
# The loss runs inside `value_and_grad` and the metrics outside, on other tracers.
METRICS_SEE_PREDICTIONS_OF_LOSS = False
# See `kernels/_xla_cpu.py`.
XLA_CPU_FUSES_SLICED_SUMS = False


def no_autograph(function: Callable) -> Any:
    """`function`."""
    return function


def jit(function: Callable) -> Callable:
    """`function` of tensors, compiled by XLA once for each set of shapes and dtypes."""
    return jax.jit(function)


def custom_gradient(forward: Callable, backward: Callable) -> Callable:
    """Joins `forward` and `backward` into a function that is differentiated in its first argument.

    See the function of this name for TensorFlow, which has the same parts.
    """

    def kernel(x: Tensor, *nondiff_args: Tensor, **options: Any) -> Tensor:
        @jax.custom_vjp
        def value(*inputs):
            return forward(*inputs, **options)[0]

        @jax.custom_jvp
        def residuals(*inputs):
            return forward(*inputs, **options)

        @residuals.defjvp
        def residuals_jvp(inputs, tangents):
            result, saved = residuals(*inputs)
            tangents = [t if t.dtype == jax.dtypes.float0 else where_finite(saved, [t])[0] for t in tangents]
            recomputed = functools.partial(getattr(forward, "unblocked", forward), **options)
            _, tangents = jax.jvp(recomputed, where_finite(saved, inputs), tuple(tangents))
            return (result, saved), tangents

        def forward_rule(*inputs):
            result, saved = residuals(*inputs)
            return result, (saved, inputs)

        def vjp(saved_and_inputs, upstream):
            saved, inputs = saved_and_inputs
            return backward(upstream, saved, *inputs, **options), *[None] * len(nondiff_args)

        value.defvjp(forward_rule, vjp)
        return value(x, *nondiff_args)

    return kernel


def fused_gradient(forward: Callable, backward: Callable) -> Callable:
    """Joins `forward` and `backward` into a function whose gradients may be formed in the forward pass.

    See the function of this name for TensorFlow. JAX sees by itself whether, and in what, something is differentiated:
    `needs_grad` can only narrow it, and `grad_in_forward` is not used. Second derivatives are JAX's own.
    """

    def kernel(inputs, nondiff_args, needs_grad, grad_in_forward, **options):
        @jax.custom_vjp
        def value(inputs, nondiff_args):
            result, aux, _ = forward(inputs, nondiff_args, (False,) * len(inputs), **options)
            return result, aux

        def forward_rule(inputs, nondiff_args):
            needed = tuple(x is not None and x.perturbed and need for x, need in zip(inputs, needs_grad, strict=True))
            inputs, nondiff_args = jax.tree.map(lambda leaf: leaf.value, (inputs, nondiff_args))
            result, aux, residuals = forward(inputs, nondiff_args, needed, **options)
            # The structure of what is saved is static, and so tells `vjp` which gradients are needed.
            return (result, aux), (residuals, inputs, nondiff_args, tuple(() if need else None for need in needed))

        def vjp(saved, upstreams):
            residuals, inputs, nondiff_args, needed = saved
            upstream = upstreams[0]
            no_gradients = tuple(None for _ in inputs), tuple(None for _ in nondiff_args)
            if isinstance(upstream, jax.custom_derivatives.SymbolicZero):
                return no_gradients
            needed = tuple(need is not None for need in needed)
            return tuple(backward(upstream, residuals, inputs, nondiff_args, needed, **options)), no_gradients[1]

        value.defvjp(forward_rule, vjp, symbolic_zeros=True)
        return value(tuple(inputs), tuple(nondiff_args))

    return kernel


def clear_programs() -> None:
    """Nothing: this module keeps no programs."""


def is_eager(tensor: Tensor) -> bool:
    """Whether the values of `tensor` can be read now: not while a program is traced, even of what it closes over."""
    if isinstance(tensor, jax.core.Tracer):
        return False
    # Under `jit`, operations on concrete arrays are part of the program; under `grad` alone they are not.
    return not isinstance(jax.lax.neg(numpy.float32(0)), jax.core.Tracer)


def snapshot(variable: Tensor) -> Tensor:
    """The present value of a variable, as a tensor that later assignments do not change; a tensor is returned as is."""
    return keras.ops.convert_to_tensor(variable)


def widest_int() -> str:
    """The widest integer dtype: JAX has no int64 unless `jax_enable_x64` is set."""
    return str(jax.dtypes.canonicalize_dtype("int64"))


def assert_in_graph(condition: Tensor, data: list, tensor: Tensor = None) -> Tensor:
    """`tensor`: a program of JAX cannot raise."""
    return tensor


def matmul(a: Tensor, b: Tensor, *, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    """The product of two matrices of one dtype; products of 16-bit floats are accumulated in float32."""
    contracted = ((0 if transpose_a else 1,), (1 if transpose_b else 0,))
    accumulator = "float64" if a.dtype == "float64" else "float32"
    return jax.lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=accumulator)


def fori_loop(stop: Any, body: Callable, state: Any) -> Any:
    """`state` after `body(i, state)` for i = 0, 1, ..., stop - 1."""
    return jax.lax.fori_loop(0, stop, body, state)


def update_rows(array: Tensor, start: Any, rows: Tensor) -> Tensor:
    """The array with `rows` in place of its own from `start` on."""
    return jax.lax.dynamic_update_slice(array, rows, (start, *[0] * (array.ndim - 1)))


def add_at_columns(array: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """`[n, V]` with `values` `[n, K]` added at `columns` `[n, K]`; those that come twice are added twice."""
    return array.at[jax.numpy.arange(array.shape[0])[:, None], columns].add(values)


def bitcast(array: Tensor, dtype: str) -> Tensor:
    """The bits of the array, read as another dtype of the same width."""
    return jax.lax.bitcast_convert_type(array, dtype)


def round_to_bfloat16(x: Tensor) -> Tensor:
    """`x` in bfloat16, rounded to nearest even."""
    return x.astype("bfloat16")


@functools.cache
def on_accelerator() -> bool:
    """Whether programs run on a GPU or TPU, or on several devices, rather than on the one CPU."""
    return jax.default_backend() != "cpu" or jax.device_count() > 1


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
    if distribution is None or is_eager(array) or jax.sharding.get_abstract_mesh().manual_axes:
        return None
    mesh, axis = distribution.device_mesh.backend_mesh, distribution.batch_dim_name
    if axis not in mesh.axis_names:
        return None
    rows, devices = array.shape[0], mesh.shape[axis]
    return BatchMesh(mesh, axis) if devices > 1 and isinstance(rows, int) and rows % devices == 0 else None


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


def operation_of(tensor: Tensor) -> None:
    """None: tensors of JAX do not know what made them."""
    return None


def constant_of(tensor: Tensor) -> None:
    """None: programs of JAX are not looked into."""
    return None


def program_of(tensor: Tensor) -> Any:
    """The trace that a tensor belongs to (`_trace`); None for an array, which belongs to none."""
    return getattr(tensor, "_trace", None)
