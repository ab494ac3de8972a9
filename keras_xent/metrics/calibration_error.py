"""Expected calibration error."""

from typing import Any

import keras
from keras import ops

from keras_xent import _keras, _words, arguments, provenance
from keras_xent._backend import no_autograph
from keras_xent._types import DType, Tensor
from keras_xent.kernels._dtypes import to_tensor
from keras_xent.kernels._labels import are_not_binary, check_binary, class_indices
from keras_xent.kernels._masking import nan_unless
from keras_xent.kernels._row_statistics import dense_statistics
from keras_xent.kernels._shapes import same_shape
from keras_xent.kernels.linear import LossStatistics
from keras_xent.metrics._token_mean import TokenMean, TokenValues

# Into how many sums a bin of a batch is divided.
_PARTS = 128


@keras.saving.register_keras_serializable(package="keras_xent")
class CalibrationError(TokenMean):
    """The expected calibration error: how far a model's confidence is from how often it is right.

    For classifiers and for the tokens of language models: the confidence is the largest probability. For binary
    classifiers, with one number for each example, it is the probability of a positive, against the share of positives.
    Exact over batches. With a fused head it is computed where the loss is, without materializing the logits.

    Formula: `sum_b |C_b - A_b| / sum_n t_n`, with `C_b` and `A_b` the sums over the examples `n` of a bin, with sample
    weights `t_n`, of the confidence and of hits (1 where the predicted class is the label). Bin `b` of `B` is
    `[b / B, (b + 1) / B)`, and the last one has 1 too. Without an example: nan.

    Args:
        bins: number of bins.
        from_logits: whether `y_pred` holds logits or probabilities.
        ignore_class: the label of padding.
        axis: the class axis.
        name: name of the metric.
        dtype: dtype of the result (default float32).
        logit_softcap: the loss's `logit_softcap`, if it has one.

    Call arguments: `y_true` integers `[...]`, `y_pred` `[..., C]`, or for binary classifiers `y_true` numbers from 0 to
    1 `[B]` or `[B, 1]` and `y_pred` of the same size.

    Raises:
        ValueError: an argument out of its range; shapes that do not fit.

    Example:

    >>> import numpy as np
    >>> import keras_xent as kx
    >>> metric = kx.metrics.CalibrationError(from_logits=False)
    >>> metric.update_state(np.array([0, 1]), np.array([[0.9, 0.1], [0.9, 0.1]]))
    >>> round(float(metric.result()), 4)  # sure of 0.9, right in 0.5
    0.4

    References: arXiv:1706.04599, equation (3).
    """

    needs_statistics = frozenset({"hit", "confidence"})

    def __init__(
        self,
        bins: int = 15,
        from_logits: bool = True,
        ignore_class: int | None = None,
        axis: int = -1,
        name: str = "calibration_error",
        dtype: DType = None,
        *,
        logit_softcap: float | None = None,
    ) -> None:
        self.bins = arguments.count("bins", bins)
        self._num_sums = 3 * self.bins
        super().__init__(ignore_class, axis, name, dtype, from_logits=from_logits, logit_softcap=logit_softcap)
        _keras.set_direction(self, "down")

    @no_autograph
    def update_state(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor = None) -> None:
        """Adds the examples of a batch."""
        y_pred = provenance.read_variable(arguments.tensor("y_pred", y_pred))
        rank = len(y_pred.shape)
        if rank == 1 or (y_pred.shape[-1] == 1 and self.axis in (-1, rank - 1)):
            self._sums.add(self._sums_of_binary(y_true, y_pred, sample_weight))
        else:
            super().update_state(y_true, y_pred, sample_weight)

    def result(self) -> Tensor:
        """The error; nan without an example."""
        weight, _, excess = ops.unstack(ops.reshape(self._sums.values(), (3, self.bins)))
        total = ops.sum(weight)
        error = ops.sum(ops.abs(excess)) / ops.where(total > 0, total, ops.ones_like(total))
        return ops.cast(ops.where(total > 0, error, ops.full_like(error, float("nan"))), self.dtype)

    def reliability(self) -> tuple[Any, Any, Any]:
        """For a diagram, of each bin: mean confidence, share of hits, weight of its examples. Waits for the device."""
        weight, hits, excess = self._sums.exact().reshape(3, self.bins)
        safe = weight.clip(min=1e-300)
        return (hits + excess) / safe, hits / safe, weight

    # The value of a token is its confidence, below 0 where the label is not the predicted class.

    def _values_from_statistics(self, statistics: LossStatistics) -> Tensor:
        return _signed(statistics.confidence, statistics.hit)

    def _values_from_predictions(self, labels: Tensor, y_pred: Tensor, mask: Tensor) -> Tensor:
        logits = self._logits(y_pred, is_clipped=False)
        labels = class_indices(labels, y_pred.shape[self.axis], mask)
        names = ("confidence", "hit")
        return _signed(*dense_statistics(labels, logits, names, axis=self.axis, softcap=self.logit_softcap))

    def _sum(self, tokens: TokenValues) -> Tensor:
        values = ops.cast(tokens.values, "float32")
        return self._bins(ops.abs(values), ops.cast(values > 0, "float32"), tokens.weights)

    def _sums_of_binary(self, y_true, y_pred, sample_weight):
        self._warn_of_reading(y_pred, "sigmoid")
        logits = provenance.as_logits(y_pred, from_logits=self.from_logits, activation="sigmoid", dtype="float32")
        labels = _labels_like(logits, to_tensor(y_true, "y_true"))
        weights = self._weights_of(labels, y_pred, sample_weight)
        is_active = ops.not_equal(weights, 0)
        with _words.named("y_true", "y_pred"):
            check_binary(labels, is_active)
        probability = ops.reshape(ops.sigmoid(logits), ops.shape(weights))
        # Where no error could be raised, NaN says that a label was out of range.
        bad = are_not_binary(labels, is_active)
        return self._bins(probability, nan_unless(ops.logical_not(bad), ops.cast(labels, "float32")), weights)

    def _bins(self, confidence, hits, weights):
        """`[3 bins]`: weight and hits of each bin, and by how much its confidence exceeds its hits."""
        confidence, hits, weights = (ops.reshape(x, (-1,)) for x in (confidence, hits, weights))
        is_active = ops.not_equal(weights, 0)
        # NaN has no bin. In the first it makes the result NaN.
        place = ops.where(ops.isnan(confidence), ops.zeros_like(confidence), confidence) * self.bins
        place = ops.cast(ops.clip(ops.floor(place), 0, self.bins - 1), "int32")
        # Sums of confidences and of hits are large beside what they differ by.
        columns = (weights, weights * hits, weights * (confidence - hits))
        columns = ops.stack([ops.where(is_active, column, 0.0) for column in columns], axis=1)  # [N, 3]
        # Each bin in many parts: what a sum of float32 numbers rounds grows with their number.
        part = ops.arange(ops.shape(place)[0], dtype="int32") % _PARTS
        sums = ops.segment_sum(columns, place + self.bins * part, num_segments=self.bins * _PARTS)
        sums = ops.sum(ops.reshape(sums, (_PARTS, self.bins, 3)), axis=0)  # [bins, 3]
        return ops.reshape(ops.transpose(sums), (-1,))


def _labels_like(logits, labels):
    """The labels, whose shape is that of the logits but for a last axis of 1, which either may have."""
    shapes = [tuple(one.shape) for one in (labels, logits)]
    if not same_shape(*(shape[:-1] if shape[1:] and shape[-1] == 1 else shape for shape in shapes)):
        raise ValueError(
            "`y_true` must hold one number from 0 to 1 for each number of `y_pred`, with or without a last axis of 1. "
            f"Received: y_true of shape {shapes[0]} and y_pred of shape {shapes[1]}."
        )
    return labels


def _signed(confidence, hit):
    # NaN, of a label out of range, is handed on.
    return confidence * (2.0 * hit - 1.0)
