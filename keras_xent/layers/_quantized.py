"""Heads of int8 and int4 weights: the matrix that a loss computes their logits from."""

from typing import Any

from keras import ops

from keras_xent import provenance
from keras_xent._backend import snapshot
from keras_xent.layers._heads import head_of


def has_matrix(layer: Any) -> bool:
    """Returns whether a loss can compute from the weights of a quantized layer: int8 or int4."""
    return layer.quantization_mode in ("int8", "int4")


def dequantized(weights: Any, scale: Any, zero: Any = None, groups: Any = None, *, axis: int) -> Any:
    """The float32 matrix of integer weights, whose features lie along `axis`.

    `scale` has a number for each class, by which it divides; or, with `zero`, one for each class and group of features,
    by which it multiplies: `(weights - zero) scale`. `groups` has the group of each feature.
    """
    weights, scale = (ops.cast(snapshot(tensor), "float32") for tensor in (weights, scale))
    if zero is None:
        return weights / (scale if axis == 0 else ops.reshape(scale, (-1, 1)))
    groups = ops.cast(snapshot(groups), "int32")
    zero = ops.cast(snapshot(zero), "float32")
    return (weights - ops.take(zero, groups, axis=axis)) * ops.take(scale, groups, axis=axis)


def quantized_head(
    layer: Any,
    inputs: Any,
    training: Any,
    kernel: Any,
    *,
    rounds_inputs: bool = True,
    **others: Any,
) -> provenance.Head:
    """The inputs of the logits of a quantized layer, with the `others` of `head_of`. The kernel is not trained."""
    hidden = ops.cast(inputs, "float32")
    if rounds_inputs and layer.inputs_quantizer:
        rounded, scale = layer.inputs_quantizer(inputs, axis=-1)
        # As in Keras, the gradient passes the rounding of the inputs.
        hidden = hidden + ops.stop_gradient(ops.cast(rounded, "float32") / ops.cast(scale, "float32") - hidden)
    return head_of(layer, training, hidden=hidden, kernel=ops.stop_gradient(kernel), **others)


def with_projections(head: provenance.Head, inputs: Any, factors: tuple[Any, Any]) -> provenance.Head:
    """The head with LoRA's factors, which multiply inputs that are not rounded.

    Their projection `[..., R]` lies behind the hidden states, where the kernel has R rows of zeros.
    """
    first, second = factors
    rank, features = first.shape[1], first.shape[0]
    # What lies under a mask would be multiplied by a gradient of 0. Rows that count are not finite in `head.hidden`.
    finite = ops.cast(ops.where(ops.isfinite(inputs), inputs, 0), first.dtype)
    picks_projection = ops.concatenate([ops.zeros((features, rank)), ops.eye(rank)], axis=0)
    return head._replace(
        hidden=ops.concatenate([head.hidden, ops.matmul(finite, first)], axis=-1),
        low_rank=(picks_projection, second),
        gradients=(*head.gradients, "low_rank"),
    )
