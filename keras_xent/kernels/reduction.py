"""From one loss per element to the loss: masks, weights, and the mean that is meant."""

from typing import Any

import keras
from keras import ops

from keras_xent.kernels import _devices
from keras_xent.kernels._compile import compiled

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

# Keras' own, and two of ours.
REDUCTIONS = (
    "sum_over_batch_size",
    "mean",
    "mean_with_sample_weight",
    "sum",
    "none",
    None,
    "token_mean",
    "sequence_mean",
)


def reduce(losses: Any, *, reduction: str | None, **counting: Any) -> Any:
    """Losses of shape `[B, ...]`, float32 or float64, reduced to a scalar, or only weighted for reduction None.

    With losses `l`, validity `v` (0 or 1), sample weights `t` and class weights of the labels `w`:

    - `"sum_over_batch_size"`, `"mean"`: `sum(v t l) / sum(v)`
    - `"mean_with_sample_weight"`: `sum(v t l) / sum(v t)`
    - `"token_mean"`: `sum(v t l) / sum(v t w)`, both sums over all replicas
    - `"sequence_mean"`: the mean over sequences of each one's token mean; sequences without a valid token do not count
    - `"sum"`: `sum(v t l)`
    - `None`, `"none"`: `v t l`

    A `normalizer` takes the place of the denominator (of the number of sequences in `"sequence_mean"`). Nothing valid
    gives 0. `counting` is that of `weighting`.
    """
    share, denominator = weighting(losses, reduction=reduction, **counting)
    losses = _finite(share, losses) * share
    return losses if denominator is None else mean(total(losses), denominator, reduction, counting.get("normalizer"))


def mean(total: Any, denominator: Any, reduction: str | None, normalizer: float | None = None) -> Any:
    """The sum of all shares' losses divided by the denominator that `weighting` gives.

    On replicas each has the gradient of its own share of a mean or sum over all of them. The value is the same on all:
    Keras logs the mean of the replicas' values, weighted by how many rows each of them has.
    """
    loss = ratio(total, denominator)
    if _replica() is None or not (normalizer or reduction in ("sum", "token_mean", "sequence_mean")):
        return loss
    everywhere = _over_replicas(loss) / _number_of_replicas()

    @tf.custom_gradient
    def of_all(loss):
        return tf.identity(everywhere), lambda upstream: upstream

    return of_all(loss)


def weighting(
    losses: Any,
    *,
    reduction: str | None,
    valid: Any = None,
    weights: Any = None,
    label_weights: Any = None,
    normalizer: float | None = None,
) -> tuple[Any, Any]:
    """The share of each loss, and what the sum of all shares' losses is divided by (None: the losses are not summed).

    Args:
        losses: an array of the shape and dtype of the losses. Only these are looked at.
        reduction: one of `REDUCTIONS`.
        valid: booleans that broadcast against the losses, or None.
        weights: numbers that broadcast against the losses, or None.
        label_weights: numbers of the shape of the losses (already part of them), or None.
        normalizer: a number in place of the denominator.
    """
    ones = ops.ones_like(losses)
    there = ones if valid is None else ops.cast(ops.broadcast_to(valid, ops.shape(losses)), ones.dtype)
    weights = ones if weights is None else ops.cast(weights, ones.dtype) * ones
    weights = ops.where(there > 0, weights, 0.0)
    if reduction in (None, "none"):
        return weights, None
    if reduction == "sequence_mean":
        axes = tuple(range(1, len(ones.shape)))
        mass = ops.sum(_weighted(weights, label_weights), axis=axes, keepdims=True)
        share = weights * ratio(ops.ones_like(mass), mass)
        if normalizer is not None:
            return share, normalizer
        return share, _over_replicas(ops.sum(ops.cast(ops.any(ops.not_equal(weights, 0), axis=axes), ones.dtype)))
    if normalizer is not None:
        return weights, normalizer
    if reduction == "sum":
        return weights, 1.0
    if reduction == "token_mean":
        return weights, _over_replicas(total(_weighted(weights, label_weights)))
    count = total(weights if reduction == "mean_with_sample_weight" else there)
    return weights, count * _number_of_replicas()


def _weighted(weights, label_weights):
    return weights if label_weights is None else weights * _finite(weights, label_weights)


def _finite(weights, values):
    # Selected, not multiplied: what is masked or has weight 0 may hold NaN. Where it holds a number, that is the
    # derivative for the weight.
    return ops.where(ops.logical_and(ops.equal(weights, 0), ops.logical_not(ops.isfinite(values))), 0.0, values)


def total(values: Any) -> Any:
    """The sum of all values."""
    values = ops.reshape(values, (-1,))
    devices = _devices.of_batch(values)
    return _halving(values) if devices is None else _over_devices(values, devices=devices)


# Compiled for the derivatives that are asked for in eager mode: those of JAX do not take every layout of the values.
@compiled
def _over_devices(values, *, devices):
    return _devices.each(
        devices, lambda rows, _: _devices.sum_over(devices, _halving(rows)), values, None, by_rows=False
    )


def _halving(values):
    # Additions of halves first keep the rounding of long sums as small as it looks.
    lanes = 64
    values = ops.concatenate([values, ops.zeros((-ops.shape(values)[0] % lanes,), values.dtype)])
    values = ops.reshape(values, (lanes, -1))
    while lanes > 1:
        lanes //= 2
        values = values[:lanes] + values[lanes:]
    return ops.sum(values)


def ratio(numerator: Any, denominator: Any) -> Any:
    """The quotient, and 0 where the denominator is 0."""
    return ops.divide_no_nan(numerator, denominator)


def _number_of_replicas():
    """Keras adds up the gradients of the replicas, so a replica's mean has to be a share of the mean."""
    return tf.distribute.get_strategy().num_replicas_in_sync if keras.backend.backend() == "tensorflow" else 1


def _over_replicas(value):
    """The sum over all replicas. JAX programs see all devices' data as one array, so there is nothing to add up."""
    replica = _replica()
    return value if replica is None else replica.all_reduce(tf.distribute.ReduceOp.SUM, value)


def _replica():
    """The context of one of several replicas. None outside of them, where whoever calls has all the data."""
    return tf.distribute.get_replica_context() if _number_of_replicas() > 1 else None
