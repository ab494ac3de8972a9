"""Temperature scaling."""

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_xent import _words, arguments
from keras_xent._named_arguments import named_arguments
from keras_xent._types import Tensor
from keras_xent._without_logits import Output, call_without_logits
from keras_xent.kernels._dtypes import accumulator_dtype, to_float_tensor, upcast
from keras_xent.kernels._labels import class_indices, valid_mask
from keras_xent.kernels._masking import both
from keras_xent.kernels._row_statistics import dense_statistics
from keras_xent.kernels._shapes import align_weights
from keras_xent.kernels._softmax_row import apply_softcap
from keras_xent.kernels.token_statistics import StatisticsRule, token_columns

_LIMIT = math.log(1024)


@named_arguments
def calibrate(
    model: Any,
    data: Any,
    *,
    ignore_class: int | None = None,
    batch_size: int = 32,
    tolerance: float = 1e-4,
) -> float:
    """The temperature that makes a trained model as sure as it is right: divide its logits by it.

    For classifiers, binary ones included, and language models. The predicted classes stay, the probabilities change;
    `metrics.CalibrationError` says by how much. Nothing is trained. Use data that the model was not trained on.

    Formula: the `T` with the least cross-entropy of `softmax(logits / T)`, a convex problem in `1 / T`. There the mean
    cross-entropy is the mean entropy, and that is what is solved, by the method of Ridders.

    Args:
        model: a Keras model with one output, logits, a softmax of them, or one unit before or after a sigmoid.
        data: `(x, y)` arrays, or anything that gives batches `(x, y)` or `(x, y, sample_weight)` as often as it is
            iterated over: a `tf.data.Dataset`, a `keras.utils.PyDataset`, a list.
        ignore_class: the label of padding. The Keras mask of the predictions counts too.
        batch_size: examples of a batch, where `data` are arrays.
        tolerance: relative error of the temperature.

    Returns:
        The temperature, between 1 / 1024 and 1024.

    Raises:
        ValueError: shapes that do not fit; a label out of range; data without a valid label.

    Warns:
        UserWarning: no temperature in between is best, as where the model is right everywhere, or guesses.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_xent as kx
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, kernel_initializer="identity")])
    >>> x, y = np.array([[4.0, 0.0]] * 4), np.array([0, 0, 0, 1])  # sure of 0.98, right in 0.75
    >>> round(kx.calibrate(model, (x, y)), 3)  # 4 / ln 3
    3.641

    References: arXiv:1706.04599, section 4.2.
    """
    tolerance = arguments.above_zero("tolerance", tolerance)
    batch_size = arguments.count("batch_size", batch_size)
    outputs = [
        (_of_classes(call_without_logits(model, x, False)), y, weight) for x, y, weight in _batches(data, batch_size)
    ]  # Hidden states where there is a head, logits elsewhere; the model is not called again.

    def slope(log_temperature):
        """Mean of cross-entropy less entropy: below 0 where the temperature is too high."""
        total = weight_sum = 0.0
        for batch in outputs:
            with _words.named(one_hot=_words.GIVE_INDICES):
                difference, weight = _difference_and_weight(*batch, math.exp(log_temperature), ignore_class)
            total, weight_sum = total + difference, weight_sum + weight
        if not weight_sum > 0:
            received = f"weights with the sum {weight_sum}" if weight_sum else "none"
            raise ValueError(f"`data` must hold valid labels, of weights above 0. Received: {received}.")
        if not math.isfinite(total):
            raise ValueError(
                "`model` must return finite numbers for `data`. Received: NaN or infinity among the logits of valid "
                "labels."
            )
        return total / weight_sum

    return math.exp(_root(slope, tolerance))


def _root(function, tolerance):
    """Returns the root of a falling function: growing steps up to a change of sign, then the method of Ridders."""
    low = high = 0.0
    at_low = at_high = function(0.0)
    step = math.copysign(math.log(2), at_low)
    while at_low != 0 and at_low * at_high >= 0:
        if abs(high) == _LIMIT:
            warnings.warn(
                "calibrate finds no best temperature: the cross-entropy falls as far as 1 / 1024, where the model is "
                "right everywhere in these data, or 1024, where the logits say nothing of the labels.",
                stacklevel=4,
            )
            return high
        low, at_low = high, at_high or at_low
        high, step = max(-_LIMIT, min(high + step, _LIMIT)), 1.5 * step
        at_high = function(high)
    while at_low != 0 and abs(high - low) > tolerance:
        # The interval is halved at least, and the exponential through three points usually meets the root.
        middle = (low + high) / 2
        at_middle = function(middle)
        guess = middle + (middle - low) * math.copysign(1.0, at_low - at_high) * at_middle / math.sqrt(
            at_middle**2 - at_low * at_high
        )
        points = sorted([(low, at_low), (middle, at_middle), (high, at_high), (guess, function(guess))])
        (low, at_low), (high, at_high) = next(
            pair for pair in itertools.pairwise(points) if pair[0][1] * pair[1][1] <= 0
        )
    return (low + high) / 2


def _batches(data: Any, batch_size: int) -> Iterator[tuple[Any, Any, Any]]:
    if _is_arrays(data):
        x, y, weight = _parts(data)
        examples = len(keras.tree.flatten(x)[0])
        for name, one in (("labels", y), ("weights", weight)):
            if one is not None and len(one) != examples:
                raise ValueError(f"`data` must have as many {name} as examples. Received: {examples} and {len(one)}.")
        for start in range(0, examples, batch_size):
            rows = slice(start, start + batch_size)
            inputs = keras.tree.map_structure(lambda a: a[rows], x)  # noqa: B023
            yield inputs, y[rows], None if weight is None else weight[rows]
        return
    if hasattr(data, "shape") or not (isinstance(data, keras.utils.PyDataset) or hasattr(data, "__iter__")):
        raise _not_data("None" if data is None else type(data).__name__)
    batches = data
    if isinstance(data, keras.utils.PyDataset):
        if data.num_batches is None:
            raise _not_data("a PyDataset without an end")
        # It may be read by index only.
        batches = (data[i] for i in range(data.num_batches))
    for batch in batches:
        yield _parts(batch)


def _is_arrays(data):
    """Whether the data are `(x, y)` or `(x, y, sample_weight)` rather than batches of that form."""
    if not isinstance(data, (tuple, list)) or not 2 <= len(data) <= 3:
        return False
    return not all(isinstance(one, (tuple, list)) and any(_is_array(part, one) for part in one) for one in data)


def _is_array(part, batch):
    """Whether a part of what may be a batch is an array, rather than numbers of one."""
    # A list of numbers may be an array, and `x` alone a list of arrays, for a model of several inputs.
    return hasattr(part, "shape") or (isinstance(batch, tuple) and isinstance(part, list))


def _parts(batch):
    """The inputs, labels and weights of a batch, or of all data, as arrays; None for weights that are not given."""
    if not isinstance(batch, (tuple, list)):
        raise _not_data(f"a batch of class {type(batch).__name__}")
    if not 2 <= len(batch) <= 3:
        raise _not_data(f"a batch of {len(batch)} part(s)")
    if batch[1] is None:
        raise _not_data("None for the labels")
    return (*map(_as_arrays, batch), None)[:3]


def _as_arrays(part):
    """Nested lists of numbers as an array; anything else as it is, such as a list of arrays."""
    if isinstance(part, dict):
        return {name: _as_arrays(one) for name, one in part.items()}
    if not isinstance(part, (tuple, list)) or any(hasattr(one, "shape") for one in keras.tree.flatten(part)):
        return part
    try:
        return np.asarray(part)
    except ValueError:
        raise _not_data(
            "a list of rows of uneven length. Pad them, and mark the padding with a mask or `ignore_class`; give each "
            "batch of lists as a tuple"
        ) from None


def _not_data(received):
    return ValueError(f"`data` must be arrays `(x, y)`, or batches of that form. Received: {received}.")


@dataclass(frozen=True)
class _DividedLogits(StatisticsRule):
    """Statistics of logits divided by a constant, a number of the program: each option would be another program."""

    cap: float | None = None

    def forward(self, logits: Tensor, arrays: Any, constants: Any) -> tuple[tuple[Tensor, ...], Any]:
        """The columns of the capped, divided logits."""
        (temperature,) = constants
        return super().forward(apply_softcap(logits, self.cap) / temperature, arrays, ())

    def row_scaled(self, upstream: Tensor, logits: Tensor, arrays: Any, constants: Any) -> None:
        """None: what is divided here is `forward`'s."""

    def backward(self, upstream: Tensor, residuals: Any, logits: Tensor, arrays: Any, constants: Any) -> Tensor:
        """There is none: nothing is trained here."""
        raise NotImplementedError("The statistics of calibrate have no gradient.")


def _of_classes(output: Output) -> Output:
    """The output, that of a binary classifier as logits of two classes: 0 for the other one."""
    head, logits = output.head, output.logits
    if head is not None and head.num_classes > 1:
        return output
    if head is not None:
        rows = ops.reshape(head.hidden, (-1, head.hidden.shape[-1]))
        logits = ops.reshape(head.logits_of(rows), (*ops.shape(head.hidden)[:-1], 1))
    logits = to_float_tensor(logits)
    logits = ops.expand_dims(logits, -1) if len(logits.shape) == 1 else logits
    if logits.shape[-1] == 1:
        logits = ops.concatenate([ops.zeros_like(logits), logits], axis=-1)
    return Output(None, logits, output.mask)


def _difference_and_weight(
    output: Output, labels: Tensor, weight: Tensor, temperature: float, ignore_class: Any
) -> tuple[float, float]:
    """Sums over the valid labels of a batch: of cross-entropy less entropy, and of the weights."""
    labels, valid = output.aligned(labels)
    valid = both(valid, valid_mask(labels, None, ignore_class))
    if output.head is None:
        indices = class_indices(labels, output.num_classes, valid)
        nll, entropy = dense_statistics(indices, upcast(output.logits) / temperature, ("nll", "entropy"))
    else:
        head = output.head
        rule = _DividedLogits(has_rank=False, cap=head.logit_softcap)
        constants = (ops.full((1, 1), temperature, accumulator_dtype(head.hidden)),)
        log_prob, entropy, _ = token_columns(
            rule, head.matrices(), labels, valid, constants=constants, gradients=(), chunk_bytes=head.chunk_bytes
        )
        nll = -log_prob
    weights = ops.ones_like(nll) if valid is None else ops.cast(valid, nll.dtype)
    if weight is not None:
        weights = weights * ops.cast(align_weights(weight, nll.shape), nll.dtype)
    difference = ops.where(ops.equal(weights, 0), 0.0, (nll - entropy) * weights)
    return float(ops.sum(difference)), float(ops.sum(weights))
