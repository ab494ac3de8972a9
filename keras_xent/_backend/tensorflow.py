"""What TensorFlow does its own way."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_xent._backend._finite import where_finite
from keras_xent._backend._tensorflow_graph import assert_in_graph as assert_in_graph
from keras_xent._backend._tensorflow_graph import on_accelerator as on_accelerator
from keras_xent._backend._tensorflow_graph import sums_pairwise as sums_pairwise
from keras_xent._backend._tensorflow_rows import append_rows, pad_inputs
from keras_xent._backend._tensorflow_rows import pad_to_bucket as pad_to_bucket
from keras_xent._backend._tensorflow_rows import take_rows as take_rows
from keras_xent._backend._tensorflow_rows import with_rounded_rows as with_rounded_rows
from keras_xent._backend._xla import uses_xla
from keras_xent._types import Tensor

NAME = "tensorflow"
# A training step hands one tensor of predictions to the loss and, after the optimizer, to the metrics.
METRICS_SEE_PREDICTIONS_OF_LOSS = True
# See `kernels/_xla_cpu.py`.
XLA_CPU_FUSES_SLICED_SUMS = True

# Operations that pass a probability on unchanged. StopGradient is not among them: the logits before it would train what
# somebody froze.
_TRANSPARENT = {"Cast", "Identity"}


def no_autograph(function: Callable) -> Any:
    """`function`, kept from AutoGraph, which rewrites everything that a user's `tf.function` calls."""
    return tf.autograph.experimental.do_not_convert(function)


def jit(function: Callable) -> Callable:
    """`function` of tensors, compiled by XLA once for each set of shapes and dtypes."""
    # No reduce_retracing: it relaxes two ranks to an unknown one, which XLA refuses.
    traced = tf.function(function, jit_compile=True, autograph=False)
    # A trace for each shape is meant: no reason to warn.
    traced._omit_frequent_tracing_warning = True
    return traced


def custom_gradient(forward: Callable, backward: Callable, *, has_rows: tuple[bool, ...] = ()) -> Callable:
    """Joins `forward` and `backward` into a function that is differentiated in its first argument.

    `forward(x, *nondiff_args, **options)` returns `(value, residuals)`: the residuals are the few numbers per row that
    make the gradient cheap. `backward(upstream, residuals, x, *nondiff_args, **options)` returns the gradient for `x`.

    Two custom gradients, one behind the other, make higher derivatives right:

        value      d value / d x            = backward(upstream, residuals(x, ...), x, ...)
        residuals  d residuals / d inputs   = derivative of `forward` without its loops over blocks, computed again

    `has_rows` says which arguments have rows, whose number is rounded up to a bucket (`_buckets.py`); it is empty for
    functions that are not compiled, where nothing is rounded.
    """

    def kernel(x: Tensor, *nondiff_args: Tensor, **options: Any) -> Tensor:
        # An eager tape must not record the inside of `forward`: each intermediate of the compiled program would become
        # an output of [rows, classes] size. A graph computes these only where they are needed, and there they are
        # what tangents of forward mode pass through.
        inputs = (x, *nondiff_args)
        stopped = tuple(map(tf.stop_gradient, inputs)) if is_eager(x) else inputs
        # Here and not around the kernel, where a tape would record that rows are added and taken away.
        padded, num_rows = pad_inputs(stopped, has_rows) if is_eager(x) else (inputs, None)
        result, saved = forward(*padded, **options)

        @tf.custom_gradient
        def value(*inputs):
            def vjp(upstream):
                x, nondiff_args = inputs[0], inputs[1:]
                if num_rows is not None:
                    upstream, x, nondiff_args = append_rows(upstream, padded[0]), append_rows(x, padded[0]), padded[1:]
                connected = residuals(x, *nondiff_args) if saved else saved
                gradient = backward(upstream, connected, x, *nondiff_args, **options)
                return take_rows(gradient, num_rows), *[None] * len(nondiff_args)

            return tf.identity(take_rows(result, num_rows)), vjp

        # Stopping the inputs has also cut the residuals off from them, which second derivatives need.
        @tf.custom_gradient
        def residuals(*inputs):
            def vjp(*upstream):
                program = _residuals_vjp(forward, tuple(sorted(options.items())), uses_xla())
                gradients = iter(program(upstream, saved, inputs))
                return [next(gradients) if i.dtype.is_floating else None for i in inputs]

            return tuple(map(tf.identity, saved)), vjp

        return value(x, *nondiff_args)

    rounded = with_rounded_rows(kernel, has_rows)
    return lambda x, *nondiff_args, **options: (kernel if is_eager(x) else rounded)(x, *nondiff_args, **options)


@functools.cache
def _residuals_vjp(forward, options, compiled):
    def vjp(upstream, residuals, inputs):
        upstream, inputs = where_finite(residuals, upstream), where_finite(residuals, inputs)
        recomputed = getattr(forward, "unblocked", forward)(*inputs, **dict(options))[1]
        # Not a tape: forward mode runs this first while it keeps tapes from recording.
        return tf.gradients(
            recomputed, [i for i in inputs if i.dtype.is_floating], upstream, unconnected_gradients="zero"
        )

    return jit(vjp) if compiled else vjp


def fused_gradient(forward: Callable, backward: Callable) -> Callable:
    """Joins `forward` and `backward` into a function whose gradients may be formed in the forward pass.

    `forward(inputs, nondiff_args, needs_grad, **options)` returns `(value, aux, residuals)`; `needs_grad` has a bool
    for each input, all False where only the value is needed. `backward(upstream, residuals, inputs, nondiff_args,
    needs_grad, **options)` returns a gradient for each input, None where it is not needed. The result is called as
    `f(inputs, nondiff_args, needs_grad, grad_in_forward, **options)` and returns `(value, aux)`. TensorFlow cannot see
    whether a gradient will be requested, so that `grad_in_forward` says so.

    There are no second derivatives: requesting one raises an error.
    """

    def kernel(inputs, nondiff_args, needs_grad, grad_in_forward, **options):
        given = [i for i, x in enumerate(inputs) if x is not None]
        # Stopped, or an eager tape would record the inside of `forward`.
        stopped = tuple(None if x is None else tf.stop_gradient(x) for x in inputs)
        nondiff_args = tuple(None if x is None else tf.stop_gradient(x) for x in nondiff_args)
        result, aux, residuals = forward(
            stopped, nondiff_args, needs_grad if grad_in_forward else (False,) * len(inputs), **options
        )

        @tf.custom_gradient
        def value(*present):
            return tf.identity(result), lambda upstream: vjp(upstream, *present)

        @tf.custom_gradient
        def vjp(upstream, *present):
            def second_derivative(*_):
                raise NotImplementedError(
                    "`linear_cross_entropy` has no second derivatives on TensorFlow. For these, compute the logits and "
                    "use `sparse_softmax_cross_entropy`."
                )

            gradients = backward(upstream, residuals, stopped, nondiff_args, needs_grad, **options)
            return [
                tf.zeros_like(present[n]) if gradients[i] is None else gradients[i] for n, i in enumerate(given)
            ], second_derivative

        return value(*(inputs[i] for i in given)), aux

    return kernel


def clear_programs() -> None:
    """Frees the programs that this module has compiled."""
    _residuals_vjp.cache_clear()


def is_eager(tensor: Tensor) -> bool:
    """Whether the values of `tensor` can be read now: not while a graph is traced, even of what it closes over."""
    return tf.executing_eagerly() and not tf.is_symbolic_tensor(tensor)


def snapshot(variable: Tensor) -> Tensor:
    """The present value of a variable, as a tensor that later assignments do not change; a tensor is returned as is."""
    # Of a variable Keras gives the `tf.Variable` itself, which a metric would read after the optimizer has changed it.
    return tf.convert_to_tensor(keras.ops.convert_to_tensor(variable))


def widest_int() -> str:
    """The widest integer dtype."""
    return "int64"


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


def update_rows(array: Tensor, start: Any, rows: Tensor) -> Tensor:
    """The array with `rows` in place of its own from `start` on."""
    if uses_xla():
        return keras.ops.slice_update(array, (start, *[0] * (len(array.shape) - 1)), rows)
    # The former is an operation of XLA.
    indices = start + tf.range(tf.shape(rows)[0])
    return tf.tensor_scatter_nd_update(array, indices[:, None], rows)


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


def batch_mesh(array: Tensor) -> None:
    """None: on TensorFlow each replica has its own rows."""
    return None


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


def operation_of(tensor: Tensor) -> Any:
    """The operation of a graph that made the tensor, seen through casts; None in eager mode."""
    if is_eager(tensor) or hasattr(tensor, "assign"):
        return None
    # A ragged tensor has none.
    operation = getattr(tensor, "op", None)
    while operation is not None and operation.type in _TRANSPARENT:
        operation = operation.inputs[0].op
    return operation


def program_of(tensor: Tensor) -> Any:
    """The graph that a tensor belongs to; None for a variable, which belongs to none."""
    return getattr(tensor, "graph", None)
