"""Cross-entropy of integer labels, one class out of many."""

from typing import Any

import keras
from keras import ops

from keras_xent import _accumulation, _loss_statistics, _words, arguments, provenance
from keras_xent._backend import is_eager, no_autograph
from keras_xent._types import DType, Reduction, Tensor
from keras_xent.kernels import linear, sparse_softmax, sparse_softmax_cross_entropy
from keras_xent.kernels._dtypes import accumulator_dtype, to_tensor
from keras_xent.kernels._labels import (
    are_out_of_range,
    class_weights,
    gather_class_weights,
    in_range,
    valid_mask,
)
from keras_xent.kernels._masking import both
from keras_xent.kernels._row_statistics import is_hit
from keras_xent.kernels._shapes import checked_axis, same_shape, squeeze_class_axis
from keras_xent.losses._accumulation_warning import warn_of_accumulation
from keras_xent.losses._fused import head_for, mask_and_weights, options_of
from keras_xent.losses.base import Alignment, Crossentropy, Unreduced


@keras.saving.register_keras_serializable(package="keras_xent")
class SparseCategoricalCrossentropy(Crossentropy):
    """Cross-entropy between integer labels and predicted distributions.

    For classification with one class out of many, labels given as integers. A drop-in for
    `keras.losses.SparseCategoricalCrossentropy`: same arguments, defaults and values, and any class axis on every
    backend. The arguments after `dtype` are new.

    Formula for label `k`, with `nll_c = -log p_c`, smoothing `s` and class weights `w` of `C` classes:
    `(1 - s) w_k nll_k + (s / C) sum_c w_c nll_c`, each `nll_c` times `(1 - p_c)^gamma` if focal, plus
    `z_loss (log sum exp x)^2` for logits `x`. Equivalent to
    `mean(kernels.sparse_softmax_cross_entropy(y_true, logits, ...))`.

    Args:
        from_logits: whether `y_pred` holds logits. If not, the logits before a softmax are used where they are known
            (also through the casts of mixed precision), else the logarithm of the probabilities.
        ignore_class: a label that is ignored, whatever is predicted for it.
        reduction: `"sum_over_batch_size"` or `"mean"`: the sum over the number of valid labels;
            `"mean_with_sample_weight"`: over the sum of their sample weights; `"token_mean"`: the same over all
            replicas, with class weights; `"sequence_mean"`: the mean over examples of each one's mean; `"sum"`; `None`
            or `"none"`: one loss for each label.
        axis: the class axis.
        name: name of the loss.
        dtype: dtype of the result (default float32). Sums are in float32 whatever it is, labels are never cast to
            it; with `"float64"` the whole computation is in float64.
        label_smoothing: share in [0, 1] of the target spread evenly over all classes.
        class_weight: one weight per class: `[C]`, or a dict from class to weight. **Never use the
            `class_weight` of `fit` with labels `[B, T]`**: Keras makes a wrong weight per example of it.
        focal_gamma: exponent of the focal factor `(1 - p)^gamma`.
        z_loss: weight of the squared log-sum-exp of the logits.
        logit_softcap: `c` of `c tanh(x / c)`, applied to the logits.

    Call arguments: `y_true` `[...]` or `[..., 1]` integers, `y_pred` `[..., C]`, `sample_weight` a scalar, `[B]`,
    `[B, 1]` or the shape of the losses `[...]`.

    Raises:
        ValueError: an argument out of its range; shapes that do not fit; in eager mode, a label out of range.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> loss = kx.losses.SparseCategoricalCrossentropy()
    >>> probabilities = np.array([[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]], "float32")
    >>> round(float(loss(np.array([1, 2]), probabilities)), 3)
    1.177

    In a model:

    >>> import keras
    >>> model = keras.Sequential([keras.layers.Dense(3)])
    >>> model.compile("adam", kx.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])

    References: `keras.losses.SparseCategoricalCrossentropy`; label smoothing, arXiv:1512.00567; focal loss,
    arXiv:1708.02002; z-loss, arXiv:2204.02311 (PaLM).
    """

    def __init__(
        self,
        from_logits: bool = False,
        ignore_class: int | None = None,
        reduction: Reduction | None = "sum_over_batch_size",
        axis: int = -1,
        name: str | None = "sparse_categorical_crossentropy",
        dtype: DType = None,
        *,
        label_smoothing: float = 0.0,
        class_weight: Any = None,
        focal_gamma: float = 0.0,
        z_loss: float = 0.0,
        logit_softcap: float | None = None,
    ) -> None:
        super().__init__(from_logits=from_logits, reduction=reduction, name=name, dtype=dtype)
        self.ignore_class = arguments.class_or_none("ignore_class", ignore_class)
        self.axis = arguments.axis(axis)
        self.label_smoothing = arguments.fraction("label_smoothing", label_smoothing)
        self.class_weight = arguments.class_weights("class_weight", class_weight)
        self.focal_gamma = arguments.not_negative("focal_gamma", focal_gamma)
        self.z_loss = arguments.not_negative("z_loss", z_loss)
        self.logit_softcap = arguments.positive("logit_softcap", logit_softcap)

    _takes_probabilities = False
    _instead_of_class_weight = "Give the loss `class_weight` instead."

    @no_autograph
    def __call__(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor = None) -> Tensor:
        """The reduced loss; without the logits, where their head is known."""
        if _accumulation.is_counting() and not self._overrides_call():
            return self._count(y_true, y_pred, sample_weight)
        head = None if self._overrides_call() else head_for(self, arguments.tensor("y_pred", y_pred))
        if head is None:
            return super().__call__(y_true, y_pred, sample_weight)
        warn_of_accumulation(self, y_pred, sample_weight)
        self._warn_of_class_weight(y_true, sample_weight)
        with keras.name_scope(self.name), _words.named("y_true", "y_pred"):
            return ops.cast(self._fused(head, y_true, y_pred, sample_weight), self.dtype)

    def _fused(self, head: provenance.Head, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor) -> Tensor:
        labels = to_tensor(y_true, "y_true")
        labels = squeeze_class_axis(labels, y_pred, -1, hidden=head.hidden)
        mask, weights = mask_and_weights(y_pred, sample_weight, labels)
        loss, statistics = linear.linear_cross_entropy(
            labels=labels,
            token_weights=weights,
            mask=mask,
            ignore_class=self.ignore_class,
            return_statistics=_loss_statistics.needed_statistics(),
            **options_of(self, head),
        )
        _loss_statistics.publish(self._record(statistics, y_true, y_pred, sample_weight))
        return loss

    def _count(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor) -> Tensor:
        """The call of a loss that only counts: from the labels, so that nothing is computed of the predictions."""
        with _words.named("y_true", "y_pred"):
            labels = squeeze_class_axis(to_tensor(y_true), y_pred, self.axis, asserts=False)
            mask, weights = mask_and_weights(y_pred, sample_weight, labels)
            losses = ops.zeros_like(labels, dtype="float64" if self.dtype == "float64" else "float32")
            label_weights = self._label_weights(labels, y_pred)
            return self._reduce(losses, valid_mask(labels, mask, self.ignore_class), weights, label_weights)

    def _unreduced(self, y_true: Tensor, logits: Tensor, aligned: Alignment) -> Unreduced:
        axis = checked_axis(self.axis, len(logits.shape))
        labels, valid = squeeze_class_axis(y_true, logits, axis, asserts=False), aligned.valid
        if logits.shape[self.axis] == 1:
            self._warn_once(
                "one class",
                f"{type(self).__name__} was given predictions of one class, of shape {tuple(logits.shape)}: its loss "
                "is always 0. For a yes-or-no answer of one unit use BinaryCrossentropy.",
            )
        if aligned.weights is not None:
            # Under weight 0 a label may be anything; where it is in range there is a loss.
            has_loss = ops.logical_or(aligned.nonzero_weight, in_range(labels, ops.shape(logits)[self.axis]))
            valid = both(valid, has_loss)
        losses = sparse_softmax_cross_entropy(
            labels,
            logits,
            axis=self.axis,
            mask=valid,
            ignore_class=self.ignore_class,
            class_weight=self.class_weight,
            label_smoothing=self.label_smoothing,
            focal_gamma=self.focal_gamma,
            z_loss=self.z_loss,
            logit_softcap=self.logit_softcap,
        )
        return Unreduced(losses, valid_mask(labels, None, self.ignore_class), self._label_weights(labels, logits))

    def _key_of_program(self) -> tuple | None:
        options = (self.label_smoothing, self.focal_gamma, self.z_loss, self.logit_softcap)
        return (self.ignore_class, *options) if self.class_weight is None and self.axis == -1 else None

    def _labels_of_program(self, y_true: Tensor, logits: Tensor) -> Tensor:
        return None if logits.shape[-1] == 1 else squeeze_class_axis(y_true, logits, -1)

    _rule_of_labels = "must be classes from 0 to the number of classes less 1"
    _advice_on_labels = "(if it marks padding, say so with `ignore_class`)"

    def _bad_labels(self, y_true: Tensor, logits: Tensor, valid: Tensor) -> Tensor:
        return are_out_of_range(y_true, logits.shape[-1], valid_mask(y_true, valid, self.ignore_class))

    def _labels_of_losses(self, y_true: Tensor, y_pred: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        axis = checked_axis(self.axis, len(y_pred.shape))
        if len(y_true.shape) == len(y_pred.shape) and y_true.shape[axis] == 1:
            y_true = ops.squeeze(y_true, axis=axis)
        if not same_shape(y_true.shape, losses.shape):
            return None, None
        return valid_mask(y_true, None, self.ignore_class), self._label_weights(y_true, y_pred)

    def _publish_statistics(self, given: tuple, losses: Tensor, valid: Tensor, logits: Tensor) -> None:
        y_true, y_pred, sample_weight = given
        statistics = None
        if (
            losses is not None
            and not is_eager(y_pred)
            and not (self.label_smoothing or self.class_weight is not None or self.focal_gamma or self.z_loss)
        ):
            ranks = hits = None
            if _loss_statistics.needed_statistics() & {"rank", "hit"}:
                labels = ops.reshape(to_tensor(y_true), ops.shape(losses))
                ranks = sparse_softmax.label_ranks(labels, logits, axis=self.axis)
                hits = is_hit(ranks)
            statistics = linear.LossStatistics(losses, ranks, valid, hit=hits)
        _loss_statistics.publish(self._record(statistics, y_true, y_pred, sample_weight))

    def _record(
        self, statistics: linear.LossStatistics | None, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor
    ) -> _loss_statistics.LossRecord:
        settings = _loss_statistics.Settings(
            owner=type(self).__name__,
            reading=provenance.reading(y_pred, axis=self.axis, from_logits=self.from_logits),
            axis=checked_axis(self.axis, len(y_pred.shape), "predictions"),
            ignore_class=self.ignore_class,
            logit_softcap=self.logit_softcap,
        )
        return _loss_statistics.LossRecord(statistics, y_true, y_pred, sample_weight, settings)

    def _label_weights(self, labels: Tensor, logits: Tensor) -> Tensor:
        if self.class_weight is None:
            return None
        num_classes = ops.shape(logits)[self.axis]
        weights = class_weights(self.class_weight, num_classes, accumulator_dtype(logits), 2)
        # A label out of range either is not valid, or has made the loss NaN.
        return gather_class_weights(weights, ops.clip(ops.cast(labels, "int32"), 0, num_classes - 1))
