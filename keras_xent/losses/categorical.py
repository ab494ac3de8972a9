"""Cross-entropy of distributions over the classes."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_xent import _accumulation, _keras, _words, arguments
from keras_xent._backend import is_eager, no_autograph
from keras_xent._types import DType, Reduction, Tensor
from keras_xent.kernels import linear_softmax_cross_entropy, softmax_cross_entropy
from keras_xent.kernels._dtypes import accumulator_dtype, to_tensor
from keras_xent.kernels._labels import class_weights
from keras_xent.kernels._masking import both
from keras_xent.kernels._shapes import checked_axis, same_shape
from keras_xent.losses._accumulation_warning import warn_of_accumulation
from keras_xent.losses._fused import head_for, mask_and_weights, options_of
from keras_xent.losses._swapped import refuse_swapped_values
from keras_xent.losses.base import Alignment, Crossentropy, Unreduced

_TOO_LARGE_A_SUM = 100.0
# Below what rounding, interpolation or noise make of a 0.
_TOO_SMALL = -0.21


@keras.saving.register_keras_serializable(package="keras_xent")
class CategoricalCrossentropy(Crossentropy):
    """Cross-entropy between target distributions (one-hot, mixup, or from a teacher) and predicted ones.

    A drop-in for `keras.losses.CategoricalCrossentropy`: same arguments, defaults and values. The arguments after
    `dtype` are new. With a fused head (`layers.LogitsDense`, `fuse_head`) the targets are read chunk by chunk beside
    the logits, which are not stored; they then get no gradient. For integer labels use `SparseCategoricalCrossentropy`,
    which never makes one-hot rows.

    Formula, with `q' = q (1 - s) + s / C` for smoothing `s`, class weights `w` and probabilities `p` of `C` classes:
    `-sum_c w_c q'_c (1 - p_c)^gamma log p_c + z_loss (log sum exp x)^2` for logits `x`. Equivalent to
    `mean(kernels.softmax_cross_entropy(y_true, logits, ...))`.

    Args:
        from_logits: whether `y_pred` holds logits. If not, the logits before a softmax are used where they are known
            (also through the casts of mixed precision), else the logarithm of the probabilities.
        label_smoothing: share `s` in [0, 1]: targets become `q (1 - s) + s / C`. An all-zero row stays one.
        axis: the class axis.
        reduction: `"sum_over_batch_size"` or `"mean"`: the sum over the number of valid examples;
            `"mean_with_sample_weight"`: over the sum of their sample weights; `"token_mean"`: the same over all
            replicas, with class weights; `"sequence_mean"`: the mean over examples of each one's mean; `"sum"`; `None`
            or `"none"`: one loss for each example.
        name: name of the loss.
        dtype: dtype of the result (default float32). Sums are in float32 whatever it is; with `"float64"` the whole
            computation is in float64.
        class_weight: one weight per class: `[C]`, or a dict from class to weight.
        focal_gamma: exponent of the focal factor `(1 - p)^gamma`.
        z_loss: weight of the squared log-sum-exp of the logits.
        logit_softcap: `c` of `c tanh(x / c)`, applied to the logits.

    Call arguments: `y_true` and `y_pred` `[..., C]`, `sample_weight` a scalar, `[B]`, `[B, 1]` or `[...]`.

    Raises:
        ValueError: an argument out of its range; shapes that do not fit.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> y_true = np.array([[0, 1, 0], [0, 0, 1]])
    >>> y_pred = np.array([[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]], "float32")
    >>> round(float(kx.losses.CategoricalCrossentropy()(y_true, y_pred)), 3)
    1.177

    In a model:

    >>> import keras
    >>> model = keras.Sequential([keras.layers.Dense(3)])
    >>> model.compile("adam", kx.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1))

    References: `keras.losses.CategoricalCrossentropy`; label smoothing, arXiv:1512.00567; focal loss, arXiv:1708.02002;
    z-loss, arXiv:2204.02311 (PaLM).
    """

    def __init__(
        self,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        axis: int = -1,
        reduction: Reduction | None = "sum_over_batch_size",
        name: str | None = "categorical_crossentropy",
        dtype: DType = None,
        *,
        class_weight: Any = None,
        focal_gamma: float = 0.0,
        z_loss: float = 0.0,
        logit_softcap: float | None = None,
    ) -> None:
        super().__init__(from_logits=from_logits, reduction=reduction, name=name, dtype=dtype)
        self.label_smoothing = arguments.fraction("label_smoothing", label_smoothing)
        self.axis = arguments.axis(axis)
        self.class_weight = arguments.class_weights("class_weight", class_weight)
        self.focal_gamma = arguments.not_negative("focal_gamma", focal_gamma)
        self.z_loss = arguments.not_negative("z_loss", z_loss)
        self.logit_softcap = arguments.positive("logit_softcap", logit_softcap)

    @no_autograph
    def __call__(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor = None) -> Tensor:
        """The reduced loss; without the logits, where their head is known."""
        is_own = not self._overrides_call() and type(self)._of_logits is CategoricalCrossentropy._of_logits
        reads_logits = not is_own or _accumulation.is_counting()
        head = None if reads_logits else head_for(self, arguments.tensor("y_pred", y_pred))
        if head is None:
            return super().__call__(y_true, y_pred, sample_weight)
        warn_of_accumulation(self, y_pred, sample_weight)
        with keras.name_scope(self.name), _words.named("y_true", "y_pred"):
            targets = to_tensor(y_true, "y_true")
            self._check(targets, y_pred, Alignment())
            mask, weights = mask_and_weights(y_pred, sample_weight, targets[..., 0])
            options = options_of(self, head)
            loss = linear_softmax_cross_entropy(targets=targets, token_weights=weights, mask=mask, **options)
            return ops.cast(loss, self.dtype)

    def _check(self, y_true: Tensor, logits: Tensor, aligned: Alignment) -> None:
        if not same_shape(y_true.shape, logits.shape):
            raise ValueError(
                "`y_true` and `y_pred` must have the same shape, a distribution over the classes each. Received: "
                f"y_true of shape {tuple(y_true.shape)} and y_pred of shape {tuple(logits.shape)}. For integer labels "
                "use SparseCategoricalCrossentropy."
            )
        self._warn_of_targets(y_true, logits, aligned)
        if logits.shape[self.axis] == 1:
            arguments.warn(
                f"`y_pred` of shape {tuple(logits.shape)} has one class, so the loss is always 0. For a yes-or-no "
                "answer use BinaryCrossentropy.",
                SyntaxWarning,
            )

    def _unreduced(self, y_true: Tensor, logits: Tensor, aligned: Alignment) -> Unreduced:
        self._check(y_true, logits, aligned)
        return self._of_logits(y_true, logits, aligned.valid)

    def _of_logits(self, y_true: Tensor, logits: Tensor, valid: Tensor) -> Unreduced:
        losses = softmax_cross_entropy(
            y_true,
            logits,
            axis=self.axis,
            mask=valid,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            focal_gamma=self.focal_gamma,
            z_loss=self.z_loss,
            logit_softcap=self.logit_softcap,
        )
        return Unreduced(losses, label_weights=self._label_weights(y_true, logits))

    def _key_of_program(self) -> tuple | None:
        options = (self.label_smoothing, self.focal_gamma, self.z_loss, self.logit_softcap)
        return options if self.class_weight is None and self.axis == -1 else None

    def _labels_of_program(self, y_true: Tensor, logits: Tensor) -> Tensor:
        targets = None if logits.shape[-1] == 1 else super()._labels_of_program(y_true, logits)
        if targets is not None and not is_eager(y_true):
            self._warn_of_targets(y_true, logits, Alignment())
        return targets

    def _unreduced_in_program(self, y_true: Tensor, logits: Tensor, valid: Tensor, weights: Tensor) -> Unreduced:
        return self._of_logits(y_true, logits, valid)

    def _bad_labels(self, y_true: Tensor, logits: Tensor, valid: Tensor) -> Tensor:
        y_true = ops.cast(y_true, "float32")
        is_large = ops.sum(y_true, axis=-1) >= _TOO_LARGE_A_SUM
        return both(ops.logical_or(is_large, ops.min(y_true, axis=-1) <= _TOO_SMALL), valid)

    def _warn_of_targets(self, y_true: Tensor, logits: Tensor, aligned: Alignment) -> None:
        """Says that targets are no distributions: masks of an image, whose rows sum to 255, or a teacher's logits."""
        if "targets" in self._warned:
            return
        rows: Any
        if is_eager(y_true):
            rows, sum_of, max_of, min_of = ops.cast(y_true, "float32"), ops.sum, ops.max, ops.min
            if aligned.valid is not None:
                valid = ops.expand_dims(aligned.valid, self.axis) if len(aligned.valid.shape) else aligned.valid
                rows = ops.where(valid, rows, 0.0)
        else:
            # Of a graph the labels are known if `fit` was given them as an array.
            rows, sum_of, max_of, min_of = _keras.labels_of_fit(y_true), np.sum, np.max, np.min
        if rows is None or 0 in rows.shape:
            return
        # Sums that are weights of a row are small.
        largest, least = float(max_of(sum_of(rows, axis=self.axis))), float(min_of(rows))
        if largest >= _TOO_LARGE_A_SUM:
            self._warn_once(
                "targets",
                f"{type(self).__name__} was given targets whose rows sum to {largest:.4g} rather than 1, by which "
                "their loss is multiplied. If they are images of 0 and 255, divide them by 255.",
            )
        elif least <= _TOO_SMALL:
            refuse_swapped_values(y_true, logits)
            self._warn_once(
                "targets",
                f"{type(self).__name__} was given targets down to {least:.4g}, and distributions are not below 0. If "
                "they are the logits of a teacher, use keras_xent.losses.Distillation, or take their softmax.",
            )

    def _labels_of_losses(self, y_true: Tensor, y_pred: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        axis = checked_axis(self.axis, len(y_pred.shape))
        shape = tuple(size for i, size in enumerate(y_pred.shape) if i != axis)
        fits = same_shape(y_true.shape, y_pred.shape) and same_shape(losses.shape, shape)
        return None, self._label_weights(y_true, y_pred) if fits else None

    def _label_weights(self, y_true: Tensor, logits: Tensor) -> Tensor:
        """`sum_c w_c q_c`: a row of targets weighs as much as its sum, an all-zero one nothing."""
        if self.class_weight is None and self.reduction not in ("token_mean", "sequence_mean"):
            return None
        axis = checked_axis(self.axis, len(logits.shape))
        q = ops.cast(y_true, accumulator_dtype(logits))
        if self.class_weight is not None:
            weights = class_weights(self.class_weight, ops.shape(logits)[axis], q.dtype, 2)
            q = q * ops.reshape(weights, tuple(-1 if i == axis else 1 for i in range(len(logits.shape))))
        return ops.sum(q, axis=axis)
