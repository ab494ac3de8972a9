"""From one loss per element to the loss: masks, weights, and which mean."""

import math
import typing
from typing import Any

from keras import ops

from keras_xent import _backend
from keras_xent._backend import all_reduce_sum, num_replicas, uses_xla_cpu
from keras_xent._types import Reduction, Tensor
from keras_xent.kernels._compiled import CompiledKernel
from keras_xent.kernels._dtypes import dtype_of
from keras_xent.kernels._masking import where_or_zero

REDUCTIONS: tuple[str | None, ...] = (*typing.get_args(Reduction), None)


def checked_reduction(reduction: Any) -> Reduction | None:
    """The reduction; a ValueError if there is none of this name."""
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"Invalid value for argument: `reduction` must be one of {', '.join(map(repr, REDUCTIONS))}. "
            f"Received: reduction={reduction!r}."
        )
    return reduction


def reduce(losses: Tensor, *, reduction: str | None, **counting: Any) -> Tensor:
    """Losses of shape `[B, ...]`, float32 or float64, reduced to a scalar, or only weighted for reduction None.

    With losses `l`, validity `v` (0 or 1), sample weights `t` and class weights of the labels `w`:

    - `"sum_over_batch_size"`, `"mean"`: `sum(v t l) / sum(v)`
    - `"mean_with_sample_weight"`: `sum(v t l) / sum(v t)`
    - `"token_mean"`: `sum(v t l) / sum(v t w)`, both sums over all replicas
    - `"sequence_mean"`: the mean over sequences of each one's token mean; sequences without a valid token are left out
    - `"sum"`: `sum(v t l)`
    - `None`, `"none"`: `v t l`

    A `normalizer` takes the place of the denominator (of the number of sequences in `"sequence_mean"`). Nothing valid
    gives 0. `counting` are the arguments of `reduction_weights`.
    """
    if _is_simple(reduction, **counting):
        return _reduce_valid(losses, reduction, counting.get("valid"), counting.get("normalizer"))
    weights, denominator = reduction_weights(losses, reduction=reduction, **counting)
    losses = _finite_or_weighted(weights, losses) * weights
    if denominator is None:
        return losses
    return mean(total(losses), denominator, reduction, counting.get("normalizer"))


def _is_simple(reduction, *, valid=None, weights=None, label_weights=None, normalizer=None):
    return weights is None and reduction != "sequence_mean" and (label_weights is None or reduction != "token_mean")


def _reduce_valid(losses, reduction, valid, normalizer):
    """`reduce` without weights: losses are selected and added up, and nothing of their size is made beside them."""
    if valid is not None:
        valid = ops.cast(valid, "bool")
        losses = where_or_zero(losses, valid)
    if reduction in (None, "none"):
        return losses
    if normalizer is not None:
        return mean(total(losses), normalizer, reduction, normalizer)
    if reduction == "sum":
        return mean(total(losses), 1.0, reduction)
    count = _count(losses, valid)
    if num_replicas() > 1:
        count = all_reduce_sum(ops.convert_to_tensor(count)) if reduction == "token_mean" else _of_replica(count)
    elif isinstance(count, float) and _sums_as_product(losses):
        # Divided in the loop that computes the losses.
        losses, count = losses * (1.0 / max(count, 1.0)), 1.0
    return mean(total(losses), count, reduction)


def mean(total: Tensor, denominator: Any, reduction: str | None, normalizer: Any = None) -> Tensor:
    """The sum of the weighted losses divided by the denominator that `reduction_weights` gives.

    Each replica has the gradient of its own part of a mean or sum over all of them. The value is the same on all: Keras
    logs the mean of the replicas' values, weighted by how many rows each of them has.
    """
    if isinstance(denominator, float):
        loss = total / denominator if denominator else total
    else:
        loss = ops.divide_no_nan(total, ops.cast(denominator, dtype_of(total)))
    is_over_replicas = normalizer is not None or reduction in ("sum", "token_mean", "sequence_mean")
    return _backend.with_value_of_all_replicas(loss) if is_over_replicas else loss


def reduction_weights(
    losses: Tensor,
    *,
    reduction: str | None,
    valid: Tensor = None,
    weights: Tensor = None,
    label_weights: Tensor = None,
    normalizer: float | None = None,
) -> tuple[Tensor, Any]:
    """The weight of each loss, and what the weighted sum is divided by (None: the losses are not summed).

    Args:
        losses: an array of the shape and dtype of the losses. Only these are looked at.
        reduction: one of `REDUCTIONS`.
        valid: booleans that broadcast against the losses, or None.
        weights: numbers that broadcast against the losses, or None.
        label_weights: numbers of the shape of the losses (already part of them), or None.
        normalizer: a number in place of the denominator.
    """
    if weights is not None:
        weights = ops.cast(weights, dtype_of(losses))
    if valid is not None:
        valid = _broadcast(ops.cast(valid, "bool"), losses)
        weights = ops.cast(valid, dtype_of(losses)) if weights is None else where_or_zero(weights, valid)
    weights = ops.ones_like(losses) if weights is None else _broadcast(weights, losses)
    if reduction in (None, "none"):
        return weights, None
    if reduction == "sequence_mean":
        return _sequence_weights(weights, label_weights, normalizer)
    if normalizer is not None:
        return weights, normalizer
    if reduction == "sum":
        return weights, 1.0
    if reduction == "token_mean":
        return weights, all_reduce_sum(total(_times_label_weights(weights, label_weights)))
    if reduction == "mean_with_sample_weight":
        return weights, _of_replica(total(weights))
    return weights, _of_replica(_count(losses, valid))


def _of_replica(count):
    # Keras adds up the gradients of the replicas, so a replica's mean has to be a share of the mean.
    return count if num_replicas() == 1 else count * num_replicas()


def _count(losses, valid):
    """Returns the number of valid losses (None: all), a float where the shape is known."""
    if valid is not None:
        return total(_broadcast(ops.cast(valid, dtype_of(losses)), losses))
    size = math.prod(losses.shape) if None not in losses.shape else ops.size(losses)
    return float(size) if isinstance(size, int) else ops.cast(size, dtype_of(losses))


def _broadcast(array, losses):
    if array.shape == losses.shape and (len(array.shape) == 1 or None not in losses.shape):
        # One axis has passed the checks, and is as long even if its size is not known.
        return array
    return ops.broadcast_to(array, ops.shape(losses))


def _sequence_weights(weights, label_weights, normalizer):
    axes = tuple(range(1, len(weights.shape)))
    weight_sum = ops.sum(_times_label_weights(weights, label_weights), axis=axes, keepdims=True)  # [B, 1, ...]
    if normalizer is None:
        has_tokens = ops.any(ops.not_equal(weights, 0), axis=axes)  # [B]
        normalizer = all_reduce_sum(ops.sum(ops.cast(has_tokens, weights.dtype)))
    return weights * ops.divide_no_nan(ops.ones_like(weight_sum), weight_sum), normalizer


def _times_label_weights(weights, label_weights):
    return weights if label_weights is None else weights * _finite_or_weighted(weights, label_weights)


def _finite_or_weighted(weights, values):
    # Selected, not multiplied: what is masked or has weight 0 may hold NaN. Where it holds a number, that is the
    # derivative for the weight.
    return ops.where(ops.logical_and(ops.equal(weights, 0), ops.logical_not(ops.isfinite(values))), 0.0, values)


def total(values: Tensor) -> Tensor:
    """The sum of all values."""
    if len(values.shape) == 0:
        return values
    mesh: Any = _backend.batch_mesh(values)
    if mesh is not None:
        return _sum_over_devices(ops.reshape(values, (-1,)), mesh=mesh)
    if _backend.sums_pairwise():
        return ops.sum(values)
    if not _backend.is_eager(values):
        # Not a program inside the program: of its gradient TensorFlow 2.21 makes one for each new value.
        return _pairwise_sum(ops.reshape(values, (-1,)))
    (values,), _ = _backend.pad_to_bucket([values])
    return _compiled_sum(values)


@CompiledKernel
def _compiled_sum(values):
    return _pairwise_sum(ops.reshape(values, (-1,)))


# Compiled for derivatives in eager mode: those of JAX do not take every layout of the values.
@CompiledKernel
def _sum_over_devices(values, *, mesh):
    def on_device(rows, _):
        return _backend.psum(mesh, _pairwise_sum(rows))

    return _backend.shard_map_rows(mesh, on_device, values, None, has_rows=False)


# The rounding of so few additions is small.
_FEW = 128
_LANES = 64


def _sums_as_product(values):
    """Whether sums are products with ones.

    XLA:CPU makes them a part of the loop before. Of a sum it makes two loops more, which take 15 ms each to compile.
    """
    is_known = all(isinstance(size, int) and size > 0 for size in values.shape)
    return uses_xla_cpu() and not _backend.sums_pairwise() and is_known


@_backend.with_gradient_of_sum
def _pairwise_sum(values):
    if values.shape[0] is None and dtype_of(values) == "float32":
        # A size that XLA knows only when the program runs, as after `tf.boolean_mask`, cannot be rounded up.
        return ops.cast(ops.sum(ops.cast(values, "float64")), values.dtype)
    size = values.shape[0]
    is_symbolic = size is not None and not isinstance(size, int)  # as `jax.export` has it
    if is_symbolic or _backend.is_partitioned(values):
        return ops.sum(values)
    is_product = _sums_as_product(values)
    while is_product and values.shape[0] > _FEW:
        # The sums of parts have little rounding.
        values = ops.reshape(_padded(values, values.shape[0]), (-1, _LANES))
        values = ops.matmul(values, ops.ones((_LANES,), values.dtype))
    if is_product:
        return ops.matmul(values, ops.ones_like(values))
    if size is not None and size <= _FEW:
        return ops.sum(values)
    # So has a sum to which halves are added one to the other first.
    lanes = _LANES
    values = ops.reshape(_padded(values, ops.shape(values)[0]), (lanes, -1))
    while lanes > 1:
        lanes //= 2
        values = values[:lanes] + values[lanes:]
    return ops.sum(values)


def _padded(values, size):
    """The values, and zeros up to whole lanes."""
    if isinstance(size, int) and size % _LANES == 0:
        return values
    return ops.concatenate([values, ops.zeros((-size % _LANES,), values.dtype)])
