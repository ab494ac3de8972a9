"""Shapes: the class axis and rows, and how labels, masks and weights line up with losses."""

import functools
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_xent import _words
from keras_xent._backend import assert_in_graph
from keras_xent._types import Shape, Tensor
from keras_xent.kernels._dtypes import to_tensor


def as_rows(tensor: Tensor, axis: int) -> Tensor:
    """The tensor with its class axis second: `[rows, classes]` for a last axis, else `[outer, classes, inner]`."""
    rank = len(tensor.shape)
    axis = axis % rank
    if axis == rank - 1:
        columns = tensor.shape[axis]
        if rank == 2:
            return tensor
        return ops.reshape(tensor, (-1, ops.shape(tensor)[axis] if columns is None else columns))
    shape = ops.shape(tensor)
    return ops.reshape(tensor, (math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])))


def size_of(tensor: Tensor, axis: int) -> Any:
    """The size of an axis: a number, or a tensor where it is known when the program runs."""
    return tensor.shape[axis] or ops.shape(tensor)[axis]


def broadcast_to_rows(tensor: Tensor, axis: int, rank: int) -> Tensor:
    """A tensor without the class axis, shaped so that it broadcasts against `as_rows(logits, axis)`."""
    return as_rows(ops.expand_dims(tensor, axis % rank), axis)


def reshape_to(array: Tensor, like: Tensor, *, without: int | None = None) -> Tensor:
    """The array in the shape of `like`, without its axis `without`."""
    shape: Any = [size for i, size in enumerate(like.shape) if i != without]
    if shape.count(None) == 1 and 0 not in shape:
        shape = [-1 if size is None else size for size in shape]
    elif None in shape:
        shape = [size for i, size in enumerate(ops.shape(like)) if i != without]
    return ops.reshape(array, shape)


def checked_axis(axis: Any, rank: int, name: str = "logits") -> int:
    """The axis counted from the front; a ValueError if there is no such axis."""
    if rank == 0:
        raise ValueError(
            f"`{_words.names()[1]}` must have a class axis: shape [..., classes]. Received: {name} of shape (), a "
            "single number."
        )
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)) or not -rank <= axis < rank:
        raise ValueError(
            f"`axis` must be an integer from {-rank} to {rank - 1} for {name} of {rank} dimensions. "
            f"Received: axis={axis!r}."
        )
    return int(axis) % rank


def same_shape(one: Any, other: Any) -> bool:
    """Returns whether two static shapes may be the same; None stands for any size."""
    one, other = tuple(one), tuple(other)
    return len(one) == len(other) and all(a is None or b is None or a == b for a, b in zip(one, other, strict=True))


def ensure_shape(
    tensor: Tensor, like: Tensor, sentence: str, *, without: int | None = None, may_repeat: bool = False
) -> Tensor:
    """The tensor; in a TensorFlow graph on the CPU after an assertion that unknown sizes are those of `like`.

    A tensor of size 1 would else be broadcast silently; with `may_repeat` it may be, but not along the first axis.
    `without` is an axis of `like` that the tensor does not have.
    """
    known = [size for i, size in enumerate(like.shape) if i != without]
    unknown = [i for i, size in enumerate(known) if tensor.shape[i] is None or size is None]
    if not unknown:
        return tensor
    sizes = [size for i, size in enumerate(ops.shape(like)) if i != without]
    given = ops.shape(tensor)
    fits = [
        ops.logical_or(ops.equal(given[i], sizes[i]), ops.equal(given[i], 1))
        if may_repeat and i
        else ops.equal(given[i], sizes[i])
        for i in unknown
    ]
    message = [f"{sentence} Received: shape", *given, "where", *sizes, "is needed."]
    return assert_in_graph(functools.reduce(ops.logical_and, fits), lambda: message, tensor)


def ensure_size(vector: Tensor, size: Any, sentence: str) -> Tensor:
    """The vector; where `size` is not a number yet, after an assertion that it has this size."""
    if isinstance(size, int):
        return vector
    given = ops.shape(vector)[0]
    return assert_in_graph(
        ops.equal(given, size), lambda: [f"{sentence} Received: size", given, "where", size, "is needed."], vector
    )


def squeeze_class_axis(
    labels: Tensor,
    logits: Tensor,
    axis: int,
    *,
    hidden: Tensor = None,
    asserts: bool = True,
    num_classes: int | None = None,
) -> Tensor:
    """Labels of the shape of `logits` without its class axis; a class axis of size 1 is removed.

    Sizes that are not known before the step runs are taken from `hidden`, the hidden states, where the logits should
    not be materialized: a graph would compute them for their shape alone. Without `asserts` they are not looked at: a
    kernel will. `num_classes` says how many classes there are where `logits` are the hidden states.
    """
    rank = len(logits.shape)
    predictions = tuple(logits.shape) if num_classes is None else (*logits.shape[:-1], num_classes)
    if len(labels.shape) == rank and labels.shape[axis] == 1:
        labels = ops.squeeze(labels, axis=axis)
    expected = tuple(size for i, size in enumerate(logits.shape) if i != axis % rank)
    if not same_shape(labels.shape, expected):
        name, predicted = _words.names()
        raise ValueError(
            f"`{name}` must have the shape of `{predicted}` without its class axis, one integer for each "
            f"distribution. Received: {name} of shape {tuple(labels.shape)} and {predicted} of shape "
            f"{predictions} with class axis {axis % rank}, so {name} of shape {expected} are needed."
            f"{_advice_on_shapes(tuple(labels.shape), predictions, predicted)}"
        )
    if not asserts:
        return labels
    return ensure_shape(
        labels,
        logits if hidden is None else hidden,
        "`labels` must have the shape of `logits` without its class axis.",
        without=axis % rank,
    )


def _advice_on_shapes(labels, logits, predicted):
    if len(logits) == 1:
        return (
            f" `{predicted}` has one number for each example, and a distribution has a class axis: shape [batch, "
            "classes]. For one unit of a yes-or-no answer use the binary loss, BinaryCrossentropy; in the place of "
            "predicted classes (argmax) give the logits or probabilities."
        )
    if same_shape(labels, logits):
        return f" {_words.words().one_hot}"
    other = [i for i in range(len(logits)) if same_shape(labels, logits[:i] + logits[i + 1 :])]
    if not other:
        return ""
    axis = other[0]
    return f" They fit class axis {axis}: move it to the end of `{predicted}`, or use a loss with `axis={axis}`."


def align_weights(
    weights: Tensor, shape: Shape, name: str = "sample_weight", *, like: Tensor = None, without: int | None = None
) -> Tensor:
    """Weights with axes of size 1 added at the end, so that they broadcast against losses of shape `shape`.

    For losses `[B, T]` these fit: a scalar, `[B]`, `[B, 1]`, `[B, T]`, and `[B, T, 1]`; of masks also `[1, T]`. Weights
    line up from the left: `[B]` weights examples, never time steps. Sizes that are not known yet are asserted to be
    those of `like`, if it is given, except for its axis `without`. What is named "mask" becomes booleans.
    None stays.
    """
    if weights is None:
        return None
    # Those of `grpo` may be symbolic, inside a Functional model.
    if not isinstance(weights, keras.KerasTensor):
        weights = to_tensor(weights, name)
    if name == "mask":
        weights = ops.cast(weights, "bool")
    shape, given = tuple(shape), tuple(weights.shape)
    if not given:
        return weights
    if len(given) == len(shape) + 1 and without is not None and given[without] == 1:
        # As labels may have it.
        weights = ops.squeeze(weights, axis=without)
    elif len(given) == len(shape) + 1 and given[-1] == 1:
        weights = ops.squeeze(weights, axis=-1)
    elif len(given) < len(shape):
        weights = ops.reshape(weights, ops.shape(weights) + (1,) * (len(shape) - len(given)))
    # For masks, `[1, T]` is one mask for all examples.
    first = 0 if name == "mask" else 1
    fits = len(weights.shape) == len(shape) and all(
        w is None or s is None or w == s or (w == 1 and i >= first)
        for i, (w, s) in enumerate(zip(weights.shape, shape, strict=True))
    )
    if not fits:
        raise ValueError(_misaligned(name, given, shape))
    if like is not None:
        rule = f"`{name}` must line up from the left with the losses: [batch], [batch, 1] or [batch, time]."
        weights = ensure_shape(weights, like, rule, without=without, may_repeat=True)
    return weights


def _misaligned(name, given, shape):
    allowed = [(), *(shape[: i + 1] for i in range(len(shape))), (*shape, 1)]
    fix = "Give one weight per example."
    if len(shape) > 1:
        allowed.insert(2, (shape[0], 1))
    if name == "mask":
        fix = (
            "If it is the Keras mask of the predictions, a layer has passed it on though it changed their shape. Take "
            "it off with a layer that has no mask (`keras.layers.Lambda(lambda x: x)`), or leave out mask_zero=True."
        )
    elif len(shape) > 2:
        fix = f"For one weight per example give shape [batch]; for one per element the shape of the losses, {shape}."
    elif len(shape) > 1:
        fix = "For one weight per example give shape [batch] or [batch, 1]; for one per time step [batch, time]."
    return (
        f"`{name}` must line up from the left with the losses, which have shape {shape}: it may have shape "
        f"{' or '.join(map(str, allowed))}. Received: {name} of shape {given}. {fix}"
    )
