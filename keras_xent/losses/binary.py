"""Cross-entropy of independent yes-or-no labels, one or many to an example."""

from typing import Any

import keras
from keras import ops

from keras_xent import arguments
from keras_xent._types import DType, Reduction, Tensor
from keras_xent.kernels import sigmoid_cross_entropy
from keras_xent.kernels._labels import are_not_binary, check_binary, valid_mask
from keras_xent.kernels._masking import both, where_or_zero
from keras_xent.kernels._shapes import checked_axis, same_shape
from keras_xent.losses._swapped import refuse_swapped_values
from keras_xent.losses.base import Alignment, Crossentropy, Unreduced


@keras.saving.register_keras_serializable(package="keras_xent")
class BinaryCrossentropy(Crossentropy):
    """Cross-entropy between labels in [0, 1] and predicted probabilities, the mean over an example's labels.

    For binary and multi-label classification. A drop-in for `keras.losses.BinaryCrossentropy`: same arguments, defaults
    and values. The arguments after `dtype` are new.

    Formula of a label, with `y' = y (1 - s) + s / 2` for smoothing `s`, positive weight `w` and probability `p`:
    `-w y' log p - (1 - y') log(1 - p)`; if focal, times `u^gamma` with `u = y' (1 - p) + (1 - y') p`, and times
    `alpha y' + (1 - alpha) (1 - y')`. Equivalent to
    `mean(kernels.sigmoid_cross_entropy(y_true, logits, axis=-1, ...))`.

    Args:
        from_logits: whether `y_pred` holds logits. If not, the logits before a sigmoid are used where they are known
            (also through the casts of mixed precision), else the log-odds of the probabilities.
        label_smoothing: share in [0, 1] by which labels move to 1/2.
        axis: the axis of an example's labels; the loss is their mean.
        reduction: `"sum_over_batch_size"` or `"mean"`: the sum over the number of valid examples;
            `"mean_with_sample_weight"`: over the sum of their sample weights; `"token_mean"`: the same over all
            replicas; `"sequence_mean"`: the mean over examples of each one's mean; `"sum"`; `None`
            or `"none"`: one loss for each example.
        name: name of the loss.
        dtype: dtype of the result (default float32). Sums are in float32 whatever it is; with `"float64"` the whole
            computation is in float64.
        pos_weight: weight of positive labels: a number, or a list with one for each label of an example.
        focal_gamma: exponent of the focal factor (`keras.losses.BinaryFocalCrossentropy` has 2.0).
        focal_alpha: weight of positive labels in [0, 1], negative ones weigh `1 - alpha`; None for no balancing.
        ignore_class: the label, a number or nan, that marks a missing one. The mean of an example is that of the labels
            it has; an example without any is left out.

    Call arguments: `y_true` and `y_pred` `[..., L]`, `sample_weight` a scalar, `[B]`, `[B, 1]`, `[...]`, or one for
    each label `[..., L]`, which is applied before the mean over an example's labels. A Keras mask on `y_pred` may mark
    examples `[...]`, or labels `[..., L]`.

    Raises:
        ValueError: an argument out of its range; shapes that do not fit; in eager mode, a label outside [0, 1].

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> y_true = np.array([[1, 0, -1], [0, -1, -1]])
    >>> y_pred = np.array([[0.9, 0.2, 0.5], [0.4, 0.6, 0.3]], "float32")
    >>> loss = kx.losses.BinaryCrossentropy(ignore_class=-1, reduction=None)
    >>> [round(float(x), 4) for x in loss(y_true, y_pred)]  # the mean of -ln 0.9 and -ln 0.8; -ln 0.6
    [0.1643, 0.5108]

    In a model, for rare positives:

    >>> import keras
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> model.compile("adam", kx.losses.BinaryCrossentropy(from_logits=True, pos_weight=5.0))

    References: `keras.losses.BinaryCrossentropy` and `BinaryFocalCrossentropy`; focal loss, arXiv:1708.02002.
    """

    _activation = "sigmoid"
    _elements_have_labels = True
    _instead_of_class_weight = "Give the loss `pos_weight`, or `sample_weight` of the shape of the labels."

    def __init__(
        self,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        axis: int = -1,
        reduction: Reduction | None = "sum_over_batch_size",
        name: str | None = "binary_crossentropy",
        dtype: DType = None,
        *,
        pos_weight: Any = None,
        focal_gamma: float = 0.0,
        focal_alpha: float | None = None,
        ignore_class: float | None = None,
    ) -> None:
        super().__init__(from_logits=from_logits, reduction=reduction, name=name, dtype=dtype)
        self.label_smoothing = arguments.fraction("label_smoothing", label_smoothing)
        self.axis = arguments.axis(axis)
        self.pos_weight = arguments.label_weights("pos_weight", pos_weight)
        self.focal_gamma = arguments.not_negative("focal_gamma", focal_gamma)
        self.focal_alpha = None if focal_alpha is None else arguments.fraction("focal_alpha", focal_alpha)
        self.ignore_class = arguments.label_or_none("ignore_class", ignore_class)

    def _labels_and_logits(self, y_true: Tensor, y_pred: Tensor) -> tuple[Tensor, Tensor]:
        y_true, logits = super()._labels_and_logits(y_true, y_pred)
        # [B] labels for [B, 1] predictions and the reverse, as Keras allows.
        if len(y_true.shape) == len(logits.shape) - 1 and logits.shape[-1] == 1:
            y_true = ops.expand_dims(y_true, -1)
        elif len(logits.shape) == len(y_true.shape) - 1 and y_true.shape[-1] == 1:
            logits = ops.expand_dims(logits, -1)
        if not same_shape(y_true.shape, logits.shape):
            raise ValueError(
                "`y_true` and `y_pred` must have the same shape. "
                f"Received: y_true of shape {tuple(y_true.shape)} and y_pred of shape {tuple(logits.shape)}."
                f"{_advice_on_shapes(y_true, logits)}"
            )
        return y_true, logits

    def _labels_of_losses(self, y_true: Tensor, y_pred: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        has_label = valid_mask(y_true, None, self.ignore_class)
        if has_label is None or same_shape(y_true.shape, losses.shape):
            return has_label, None
        axis = checked_axis(self.axis, len(y_pred.shape))
        has_label = ops.any(has_label, axis=axis) if len(has_label.shape) > axis else has_label
        return has_label if same_shape(has_label.shape, losses.shape) else None, None

    def _unreduced(self, y_true: Tensor, logits: Tensor, aligned: Alignment) -> Unreduced:
        axis = checked_axis(self.axis, len(logits.shape))
        has_label = valid_mask(y_true, aligned.label_mask, self.ignore_class)
        counted = _and(has_label, aligned.valid, axis)
        checked = _and(counted, aligned.nonzero_weight, axis)
        if aligned.weights_of_labels is not None:
            checked = both(checked, ops.not_equal(aligned.weights_of_labels, 0))
        try:
            check_binary(y_true, checked)
        except ValueError:
            # Only an eager call raises it here.
            refuse_swapped_values(y_true, logits)
            raise
        if aligned.weights_of_labels is not None:
            return self._of_labels(y_true, logits, aligned, counted, axis)
        losses = self._cross_entropy(y_true, logits, aligned.label_mask, axis=axis)
        return Unreduced(losses, None if has_label is None else ops.any(has_label, axis=axis))

    def _key_of_program(self) -> tuple | None:
        options = (self.ignore_class, self.label_smoothing, self.focal_gamma, self.focal_alpha)
        # nan is not equal to itself, and would be a new program in each call.
        return tuple(map(repr, options)) if self.pos_weight is None and self.axis == -1 else None

    _rule_of_labels = "must be numbers from 0 to 1"
    _advice_on_labels = "(if it marks a missing label, say so with `ignore_class`)"

    def _bad_labels(self, y_true: Tensor, logits: Tensor, valid: Tensor) -> Tensor:
        return are_not_binary(y_true, _and(valid_mask(y_true, None, self.ignore_class), valid, -1))

    def _of_labels(self, y_true: Tensor, logits: Tensor, aligned: Alignment, counted: Tensor, axis: int) -> Unreduced:
        """Weighed label by label: the mean of an example is that of its weighed losses.

        Where the weights are the denominator, each label is an element of its own.
        """
        tensors = (y_true, logits, aligned.label_mask, counted, aligned.weights_of_labels)
        # `pos_weight` of single labels lies along the last axis.
        y_true, logits, mask, counted, weights = (None if t is None else ops.moveaxis(t, axis, -1) for t in tensors)
        losses = self._cross_entropy(y_true, logits, mask, axis=None)
        # NaN times the gradient 0 of a label that does not count is NaN.
        weights = where_or_zero(ops.cast(weights, losses.dtype), counted)
        if self.reduction in ("mean_with_sample_weight", "token_mean", "sequence_mean"):
            return Unreduced(losses, counted, weights=weights)
        is_used = ops.logical_or(ops.not_equal(weights, 0), ops.isfinite(losses))
        weighed = where_or_zero(where_or_zero(losses, is_used) * weights, counted)
        count = ops.cast(ops.ones_like(losses, dtype="bool") if counted is None else counted, losses.dtype)
        count = ops.sum(count, axis=-1)
        mean = ops.sum(weighed, axis=-1) / ops.maximum(count, 1.0)
        return Unreduced(mean, None if counted is None else ops.any(counted, axis=-1))

    def _cross_entropy(self, y_true: Tensor, logits: Tensor, mask: Tensor, axis: int | None) -> Tensor:
        return sigmoid_cross_entropy(
            y_true,
            logits,
            axis=axis,
            mask=mask,
            ignore_class=self.ignore_class,
            label_smoothing=self.label_smoothing,
            pos_weight=self.pos_weight,
            focal_gamma=self.focal_gamma,
            focal_alpha=self.focal_alpha,
        )


def _advice_on_shapes(labels, logits):
    if len(labels.shape) != len(logits.shape) - 1 or not same_shape(labels.shape, logits.shape[:-1]):
        return ""
    classes = logits.shape[-1]
    last = "the number of classes less 1" if classes is None else classes - 1
    return (
        f" For one label per example, a class from 0 to {last}, use SparseCategoricalCrossentropy; for a yes-or-no "
        "answer let the model end in one unit."
    )


def _and(labels, examples, axis):
    """True for labels that are True, in examples that are; None stands for True everywhere."""
    if examples is None:
        return labels
    examples = ops.expand_dims(examples, axis) if len(examples.shape) else examples
    return both(labels, examples)
