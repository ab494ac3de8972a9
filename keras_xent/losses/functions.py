"""The losses as functions, with the arguments of those in `keras.losses`: one loss for each example."""

import functools
from typing import Any

import keras
from keras import ops

from keras_xent import _keras
from keras_xent._types import Tensor
from keras_xent.kernels._dtypes import to_tensor
from keras_xent.kernels._labels import valid_mask
from keras_xent.losses.binary import BinaryCrossentropy
from keras_xent.losses.binary_focal import BinaryFocalCrossentropy
from keras_xent.losses.categorical import CategoricalCrossentropy
from keras_xent.losses.categorical_focal import CategoricalFocalCrossentropy
from keras_xent.losses.kl_divergence import KLDivergence
from keras_xent.losses.sparse_categorical import SparseCategoricalCrossentropy


def _losses(kind: Any, y_true: Tensor, y_pred: Tensor, **options: Any) -> Tensor:
    # Lists cannot be looked up.
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return _loss(kind, **options).call(y_true, y_pred)


# One object for each set of options: it remembers what it has warned of.
@functools.lru_cache(maxsize=128)
def _loss(kind, **options):
    return kind(**options)


@keras.saving.register_keras_serializable(package="keras_xent")
def binary_crossentropy(
    y_true: Tensor, y_pred: Tensor, from_logits: bool = False, label_smoothing: float = 0.0, axis: int = -1
) -> Tensor:
    """`BinaryCrossentropy` of each example, the mean over its labels: `[..., L]` to `[...]`.

    >>> import keras_xent as kx
    >>> loss = kx.losses.binary_crossentropy([[0, 1], [0, 0]], [[0.6, 0.4], [0.4, 0.6]])
    >>> [round(float(x), 3) for x in loss]
    [0.916, 0.714]
    """
    options = {"from_logits": from_logits, "label_smoothing": label_smoothing, "axis": axis}
    return _losses(BinaryCrossentropy, y_true, y_pred, **options)


@keras.saving.register_keras_serializable(package="keras_xent")
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
    """`BinaryFocalCrossentropy` of each example, the mean over its labels: `[..., L]` to `[...]`.

    >>> import keras_xent as kx
    >>> loss = kx.losses.binary_focal_crossentropy([[0, 1], [0, 0]], [[0.6, 0.4], [0.4, 0.6]])
    >>> [round(float(x), 3) for x in loss]
    [0.33, 0.206]
    """
    options = {"apply_class_balancing": apply_class_balancing, "alpha": alpha, "gamma": gamma}
    options |= {"from_logits": from_logits, "label_smoothing": label_smoothing, "axis": axis}
    return _losses(BinaryFocalCrossentropy, y_true, y_pred, **options)


@keras.saving.register_keras_serializable(package="keras_xent")
def categorical_crossentropy(
    y_true: Tensor, y_pred: Tensor, from_logits: bool = False, label_smoothing: float = 0.0, axis: int = -1
) -> Tensor:
    """`CategoricalCrossentropy` of each example: `[..., C]` to `[...]`.

    >>> import keras_xent as kx
    >>> loss = kx.losses.categorical_crossentropy([[0, 1, 0], [0, 0, 1]], [[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]])
    >>> [round(float(x), 3) for x in loss]
    [0.051, 2.303]
    """
    options = {"from_logits": from_logits, "label_smoothing": label_smoothing, "axis": axis}
    return _losses(CategoricalCrossentropy, y_true, y_pred, **options)


@keras.saving.register_keras_serializable(package="keras_xent")
def categorical_focal_crossentropy(
    y_true: Tensor,
    y_pred: Tensor,
    alpha: Any = 0.25,
    gamma: float = 2.0,
    from_logits: bool = False,
    label_smoothing: float = 0.0,
    axis: int = -1,
) -> Tensor:
    """`CategoricalFocalCrossentropy` of each example: `[..., C]` to `[...]`.

    >>> import keras_xent as kx
    >>> loss = kx.losses.categorical_focal_crossentropy([[0, 1, 0], [0, 0, 1]], [[0.05, 0.9, 0.05], [0.1, 0.85, 0.05]])
    >>> [round(float(x), 4) for x in loss]
    [0.0003, 0.6759]
    """
    options = {"alpha": alpha, "gamma": gamma, "from_logits": from_logits}
    return _losses(CategoricalFocalCrossentropy, y_true, y_pred, **options, label_smoothing=label_smoothing, axis=axis)


@keras.saving.register_keras_serializable(package="keras_xent")
def kl_divergence(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """`KLDivergence` of each example: `[..., C]` probabilities to `[...]`.

    >>> import keras_xent as kx
    >>> [round(float(x), 4) for x in kx.losses.kl_divergence([[0.5, 0.5]], [[0.25, 0.75]])]
    [0.1438]
    """
    return _losses(KLDivergence, y_true, y_pred)


@keras.saving.register_keras_serializable(package="keras_xent")
def sparse_categorical_crossentropy(
    y_true: Tensor, y_pred: Tensor, from_logits: bool = False, ignore_class: int | None = None, axis: int = -1
) -> Tensor:
    """`SparseCategoricalCrossentropy` of each label: `[..., C]` to `[...]`, 0 for ignored ones, which get a Keras mask.

    >>> import keras_xent as kx
    >>> loss = kx.losses.sparse_categorical_crossentropy([1, 2], [[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]])
    >>> [round(float(x), 3) for x in loss]
    [0.051, 2.303]
    """
    options = {"from_logits": from_logits, "ignore_class": ignore_class, "axis": axis}
    losses = _losses(SparseCategoricalCrossentropy, y_true, y_pred, **options)
    if ignore_class is not None:
        # The mean over what counts is made by the wrapper of Keras, which reads the mask.
        labels = ops.reshape(to_tensor(y_true), ops.shape(losses))
        _keras.set_mask(losses, valid_mask(labels, None, ignore_class))
    return losses
