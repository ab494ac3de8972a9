"""The losses as functions, with the arguments of those in `keras.losses`: one loss for each example."""

import functools
from typing import Any

from keras import ops

from keras_xent import _keras, arguments
from keras_xent._named_arguments import named_arguments, serializable
from keras_xent._types import Tensor
from keras_xent.kernels._dtypes import to_tensor
from keras_xent.kernels._labels import valid_mask
from keras_xent.losses.binary import BinaryCrossentropy
from keras_xent.losses.binary_focal import BinaryFocalCrossentropy
from keras_xent.losses.categorical import CategoricalCrossentropy
from keras_xent.losses.categorical_focal import CategoricalFocalCrossentropy
from keras_xent.losses.kl_divergence import KLDivergence
from keras_xent.losses.sparse_categorical import SparseCategoricalCrossentropy


def _losses(kind: Any, y_true: Tensor, y_pred: Tensor, *options: Any) -> Tensor:
    if any(map(arguments.is_variable, options)):
        return kind(*options).call(y_true, y_pred)
    # Lists and arrays cannot be looked up.
    plain = [tuple(one) if isinstance(one, list) else arguments.plain_number(one) for one in options]
    return _loss(kind, *plain).call(y_true, y_pred)


# One object for each set of options, so that it warns once.
@functools.lru_cache(maxsize=128)
def _loss(kind, *options):
    return kind(*options)


@serializable
@named_arguments
def binary_crossentropy(
    y_true: Tensor, y_pred: Tensor, from_logits: bool = False, label_smoothing: float = 0.0, axis: int = -1
) -> Tensor:
    """Cross-entropy of binary labels for each example, the mean over its labels.

    A drop-in for `keras.losses.binary_crossentropy`, and the function of `keras_xent.losses.BinaryCrossentropy`.

    Formula of a label: `-y log p - (1 - y) log(1 - p)`.

    Args:
        y_true: labels in [0, 1], `[..., L]`.
        y_pred: probabilities or logits, of the shape of `y_true`.
        from_logits: whether `y_pred` holds logits.
        label_smoothing: share in [0, 1] by which labels move to 1/2.
        axis: the axis of an example's labels.

    Returns:
        Losses `[...]`, float32 (float64 for float64 predictions).

    Raises:
        ValueError: shapes that differ; an argument out of its range; in eager mode, a label outside [0, 1].

    Example:

    >>> import keras_xent as kx
    >>> loss = kx.losses.binary_crossentropy([[0, 1], [0, 0]], [[0.6, 0.4], [0.4, 0.6]])
    >>> [round(float(x), 3) for x in loss]
    [0.916, 0.714]
    """
    return _losses(BinaryCrossentropy, y_true, y_pred, from_logits, label_smoothing, axis)


@serializable
@named_arguments
def binary_focal_crossentropy(
    y_true: Tensor,
    y_pred: Tensor,
    apply_class_balancing: bool = False,
    alpha: float = 0.25,
    gamma: float = 2.0,
    from_logits: bool = False,
    label_smoothing: float = 0.0,
    axis: int = -1,
) -> Tensor:
    """Focal cross-entropy of binary labels for each example, the mean over its labels.

    A drop-in for `keras.losses.binary_focal_crossentropy`, and the function of
    `keras_xent.losses.BinaryFocalCrossentropy`.

    Formula of a label, with `p_t = y p + (1 - y) (1 - p)`: `(1 - p_t)^gamma (-y log p - (1 - y) log(1 - p))`, times
    `alpha y + (1 - alpha) (1 - y)` if balanced.

    Args:
        y_true: labels in [0, 1], `[..., L]`.
        y_pred: probabilities or logits, of the shape of `y_true`.
        apply_class_balancing: whether positive labels have weight `alpha`, and negative ones `1 - alpha`.
        alpha: the weight of positive labels in [0, 1].
        gamma: exponent of the focal factor.
        from_logits: whether `y_pred` holds logits.
        label_smoothing: share in [0, 1] by which labels move to 1/2.
        axis: the axis of an example's labels.

    Returns:
        Losses `[...]`, float32 (float64 for float64 predictions).

    Raises:
        ValueError: shapes that differ; an argument out of its range; in eager mode, a label outside [0, 1].

    Example:

    >>> import keras_xent as kx
    >>> loss = kx.losses.binary_focal_crossentropy([[0, 1], [0, 0]], [[0.6, 0.4], [0.4, 0.6]])
    >>> [round(float(x), 3) for x in loss]
    [0.33, 0.206]
    """
    options = (apply_class_balancing, alpha, gamma, from_logits, label_smoothing, axis)
    return _losses(BinaryFocalCrossentropy, y_true, y_pred, *options)


@serializable
@named_arguments
def categorical_crossentropy(
    y_true: Tensor, y_pred: Tensor, from_logits: bool = False, label_smoothing: float = 0.0, axis: int = -1
) -> Tensor:
    """Cross-entropy of target distributions (one-hot or soft labels) for each example.

    A drop-in for `keras.losses.categorical_crossentropy`, and the function of
    `keras_xent.losses.CategoricalCrossentropy`.

    Formula: `-sum_c y_c log p_c`.

    Args:
        y_true: target distributions over `C` classes, `[..., C]`.
        y_pred: probabilities or logits, of the shape of `y_true`.
        from_logits: whether `y_pred` holds logits.
        label_smoothing: share in [0, 1] of the target spread evenly over all classes.
        axis: the class axis.

    Returns:
        Losses `[...]`, float32 (float64 for float64 predictions).

    Raises:
        ValueError: shapes that differ; an argument out of its range.

    Example:

    >>> import keras_xent as kx
    >>> loss = kx.losses.categorical_crossentropy([[0, 1, 0], [0, 0, 1]], [[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]])
    >>> [round(float(x), 3) for x in loss]
    [0.051, 2.303]
    """
    return _losses(CategoricalCrossentropy, y_true, y_pred, from_logits, label_smoothing, axis)


@serializable
@named_arguments
def categorical_focal_crossentropy(
    y_true: Tensor,
    y_pred: Tensor,
    alpha: Any = 0.25,
    gamma: float = 2.0,
    from_logits: bool = False,
    label_smoothing: float = 0.0,
    axis: int = -1,
) -> Tensor:
    """Focal cross-entropy of target distributions (one-hot or soft labels) for each example.

    A drop-in for `keras.losses.categorical_focal_crossentropy`, and the function of
    `keras_xent.losses.CategoricalFocalCrossentropy`.

    Formula: `-sum_c alpha_c (1 - p_c)^gamma y_c log p_c`.

    Args:
        y_true: target distributions over `C` classes, `[..., C]`.
        y_pred: probabilities or logits, of the shape of `y_true`.
        alpha: one weight for all classes, or a list with one for each.
        gamma: exponent of the focal factor.
        from_logits: whether `y_pred` holds logits.
        label_smoothing: share in [0, 1] of the target spread evenly over all classes.
        axis: the class axis.

    Returns:
        Losses `[...]`, float32 (float64 for float64 predictions).

    Raises:
        ValueError: shapes that differ; an argument out of its range.

    Example:

    >>> import keras_xent as kx
    >>> loss = kx.losses.categorical_focal_crossentropy([[0, 1, 0], [0, 0, 1]], [[0.05, 0.9, 0.05], [0.1, 0.85, 0.05]])
    >>> [round(float(x), 4) for x in loss]
    [0.0003, 0.6759]
    """
    options = (arguments.label_weights("alpha", alpha), gamma, from_logits, label_smoothing, axis)
    return _losses(CategoricalFocalCrossentropy, y_true, y_pred, *options)


@serializable
@named_arguments
def kl_divergence(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Kullback-Leibler divergence of predicted probabilities from target probabilities for each example.

    A drop-in for `keras.losses.kl_divergence`, and the function of `keras_xent.losses.KLDivergence`.

    Formula: `sum_c y_c log(y_c / p_c)`, with probabilities below `keras.config.epsilon()` raised to it.

    Args:
        y_true: target probabilities of `C` classes, `[..., C]`.
        y_pred: predicted probabilities, of the shape of `y_true`.

    Returns:
        Divergences `[...]`, float32 (float64 for float64 predictions).

    Raises:
        ValueError: shapes that differ.

    Example:

    >>> import keras_xent as kx
    >>> [round(float(x), 4) for x in kx.losses.kl_divergence([[0.5, 0.5]], [[0.25, 0.75]])]
    [0.1438]
    """
    return _losses(KLDivergence, y_true, y_pred)


@serializable
@named_arguments
def sparse_categorical_crossentropy(
    y_true: Tensor, y_pred: Tensor, from_logits: bool = False, ignore_class: int | None = None, axis: int = -1
) -> Tensor:
    """Cross-entropy of integer labels, one loss for each label.

    A drop-in for `keras.losses.sparse_categorical_crossentropy`, and the function of
    `keras_xent.losses.SparseCategoricalCrossentropy`.

    Formula for label `k`: `-log p_k`.

    Args:
        y_true: integers, `[...]` or `[..., 1]`.
        y_pred: probabilities or logits of `C` classes, `[..., C]`.
        from_logits: whether `y_pred` holds logits.
        ignore_class: a label whose loss is 0, or None. The result then carries a Keras mask of the other labels.
        axis: the class axis.

    Returns:
        Losses `[...]`, float32 (float64 for float64 predictions).

    Raises:
        ValueError: shapes that do not fit; an argument out of its range; in eager mode, a label out of range.

    Example:

    >>> import keras_xent as kx
    >>> loss = kx.losses.sparse_categorical_crossentropy([1, 2], [[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]])
    >>> [round(float(x), 3) for x in loss]
    [0.051, 2.303]
    """
    losses = _losses(SparseCategoricalCrossentropy, y_true, y_pred, from_logits, ignore_class, None, axis)
    if ignore_class is not None:
        # Keras' wrapper of functions reads the mask, and takes the mean over valid labels.
        labels = ops.reshape(to_tensor(y_true), ops.shape(losses))
        _keras.set_mask(losses, valid_mask(labels, None, ignore_class))
    return losses
