"""Cross-entropy of integer labels, one class out of many."""

from typing import Any

import keras
from keras import ops

from keras_xent import arguments, source, statistics
from keras_xent.kernels import linear, sparse_softmax, sparse_softmax_cross_entropy, targets
from keras_xent.kernels._compile import as_written, is_eager
from keras_xent.losses.base import Crossentropy, Elements


@keras.saving.register_keras_serializable(package="keras_xent")
class SparseCategoricalCrossentropy(Crossentropy):
    """Cross-entropy between integer labels and predicted distributions.

    For classification with one class out of many, labels given as integers. A drop-in for
    `keras.losses.SparseCategoricalCrossentropy`: same arguments, defaults and values, and any class axis on every
    backend. The arguments after `dtype` are new.

    Equivalent to `mean(kernels.sparse_softmax_cross_entropy(y_true, logits, ...))`, which has the formula.

    Args:
        from_logits: whether `y_pred` holds logits. If not, the logits behind a softmax are used where they are known
            (also through the casts of mixed precision), else the logarithm of the probabilities.
        ignore_class: a label that does not count, whatever is predicted for it.
        reduction: `"sum_over_batch_size"` (or `"mean"`), `"mean_with_sample_weight"`, `"sum"`, `None` (or `"none"`) as
            in Keras; `"token_mean"`, `"sequence_mean"` as in `MaskedSequenceCrossentropy`.
        axis: the class axis.
        name: name of the loss.
        dtype: dtype of the result (default float32). Sums are made in float32 whatever it is, labels are never cast to
            it; with `"float64"` the whole computation is in float64.
        label_smoothing: share in [0, 1] of the target spread evenly over all classes.
        class_weight: one weight per class: `[C]`, or a dict from class to weight. **Never use that of `fit` with labels
            `[B, T]`**: Keras makes a wrong weight per example of it, which no loss can notice.
        focal_gamma: exponent of the focal factor `(1 - p)^gamma`.
        z_loss: weight of the squared log-sum-exp of the logits.
        logit_softcap: `c` of `c tanh(x / c)`, applied to the logits.

    Call arguments: `y_true` `[...]` or `[..., 1]` integers, `y_pred` `[..., C]`, `sample_weight` a scalar, `[B]`,
    `[B, 1]` or the shape of the losses `[...]`.

    Raises:
        ValueError: an argument out of its range; shapes that do not fit; in eager mode, a label that is no class.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> loss = kx.losses.SparseCategoricalCrossentropy()
    >>> probabilities = np.array([[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]], "float32")
    >>> round(float(loss(np.array([1, 2]), probabilities)), 3)
    1.177

    References: `keras.losses.SparseCategoricalCrossentropy`; the references of the kernel.
    """

    def __init__(
        self,
        from_logits: bool = False,
        ignore_class: int | None = None,
        reduction: str | None = "sum_over_batch_size",
        axis: int = -1,
        name: str | None = "sparse_categorical_crossentropy",
        dtype: Any = None,
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

    @as_written
    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """The reduced loss; without the logits, where they know what they were made from."""
        head = self._head(arguments.tensor("y_pred", y_pred))
        if head is None:
            return super().__call__(y_true, y_pred, sample_weight)
        with keras.name_scope(self.name), targets.called("y_true", "y_pred"):
            return ops.cast(self._fused(head, y_true, y_pred, sample_weight), self.dtype)

    def _head(self, y_pred):
        logits = source.fusible_logits(y_pred, axis=self.axis, from_logits=self.from_logits)
        if logits is None:
            return None
        head = source.head_of(logits)
        if head is None and (lost := source.lost_head(logits)) is not None:
            self._warn_once(
                "source",
                f"{type(self).__name__} makes the logits of layer '{lost.layer}' in memory: what came after the layer "
                "returned a new tensor, which does not know its source. End the model in that layer. The loss reads "
                "16-bit logits as they are, so that a float32 Activation after it is not needed.",
            )
        if head is not None and (readers := _readers_of_logits()):
            self._warn_once(
                "readers",
                f"The logits of layer '{head.layer}' are made in memory, since the metric '{readers[0]}' reads them; "
                f"{type(self).__name__} alone would do without. keras_xent.metrics.TokenAccuracy and Perplexity do.",
            )
        # A cap upon a cap is no cap.
        return None if head is not None and head.logit_softcap and self.logit_softcap else head

    def _fused(self, head, y_true, y_pred, sample_weight):
        labels = targets.to_tensor(arguments.tensor("y_true", y_true))
        labels = targets.without_class_axis(labels, y_pred, -1, hidden=head.hidden)
        shape, mask, weights = labels.shape, source.keras_mask(y_pred), None
        if mask is not None:
            mask = targets.aligned_weights(ops.cast(mask, "bool"), shape, "mask")
            mask = ops.broadcast_to(mask, ops.shape(labels))
        if sample_weight is not None:
            weights = targets.to_tensor(arguments.tensor("sample_weight", sample_weight))
            weights = targets.aligned_weights(weights, shape)
        # The kernel computes in the dtype of the hidden states.
        hidden = ops.cast(head.hidden, "float64") if self.dtype == "float64" else head.hidden
        loss, found = linear.with_statistics(
            hidden,
            head.kernel,
            labels,
            head.bias,
            token_weights=weights,
            transpose_kernel=head.transpose_kernel,
            mask=mask,
            ignore_class=self.ignore_class,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            focal_gamma=self.focal_gamma,
            z_loss=self.z_loss,
            logit_softcap=head.logit_softcap or self.logit_softcap,
            reduction=self.reduction,
            normalizer=self.normalizer,
            training=head.training,
            gradients=head.gradients,
            ranks=statistics.ranks_are_wanted(),
        )
        statistics.leave(self._left(found, y_true, y_pred, sample_weight))
        return loss

    def _elements(self, y_true, logits, valid, label_mask, weighted):
        labels = targets.without_class_axis(y_true, logits, targets.checked_axis(self.axis, len(logits.shape)))
        if weighted is not None:
            # Under weight 0 a label may be anything; there is a loss where it is a class.
            known = ops.logical_or(weighted, targets.are_classes(labels, ops.shape(logits)[self.axis]))
            valid = known if valid is None else ops.logical_and(valid, known)
        losses = sparse_softmax_cross_entropy(
            labels,
            logits,
            axis=self.axis,
            mask=valid,
            ignore_class=self.ignore_class,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            focal_gamma=self.focal_gamma,
            z_loss=self.z_loss,
            logit_softcap=self.logit_softcap,
        )
        return Elements(losses, targets.counted(labels, None, self.ignore_class), self._label_weights(labels, logits))

    def _leave(self, given, losses, valid, logits):
        y_true, y_pred, sample_weight = given
        if is_eager(y_pred):
            return
        known = ranks = None
        if not (self.label_smoothing or self.class_weight is not None or self.focal_gamma or self.z_loss):
            if statistics.ranks_are_wanted():
                labels = ops.reshape(targets.to_tensor(y_true), ops.shape(losses))
                ranks = sparse_softmax.label_ranks(labels, logits, axis=self.axis)
            known = linear.Statistics(losses, ranks, valid)
        statistics.leave(self._left(known, y_true, y_pred, sample_weight))

    def _left(self, known, y_true, y_pred, sample_weight):
        return statistics.Left(known, y_true, y_pred, sample_weight, self.ignore_class, self.logit_softcap)

    def _label_weights(self, labels, logits):
        if self.class_weight is None:
            return None
        num_classes = ops.shape(logits)[self.axis]
        weights = targets.class_weights(self.class_weight, num_classes, targets.accumulator_dtype(logits), 2)
        # A label that is no class either does not count, or has made the loss NaN.
        indices = ops.clip(ops.cast(labels, "int32"), 0, num_classes - 1)
        return ops.take(ops.reshape(weights, (-1,)), indices)


def _readers_of_logits():
    """Names of the metrics that read the logits of the model whose step calls the loss, by what it was compiled with.

    Of a model with several outputs it is not told whose metrics are whose.
    """
    model = source.model_of_step()
    if model is None or len(getattr(model, "outputs", None) or [None]) > 1:
        return []
    # Those that were given to `compile` are inside one of the model's metrics.
    compiled = [metric for one in model.metrics for metric in getattr(one, "metrics", ())]
    return [metric.name for metric in compiled if not getattr(metric, "finds_what_the_loss_knows", False)]
