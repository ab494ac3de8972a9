"""A loss of logits with few classes: checks, masks, reduction and gradient in one compiled program.

Where rows are short, a kernel takes less time than what is around it: an operation for each check of the labels, mask
and division, and a second program for the gradient, which reads the logits once more. The gradient is as large as the
logits and is kept until it is asked for, as Keras' own loss keeps it.
"""

import copy
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_xent import _accumulation, _backend, _loss_statistics, _words
from keras_xent._backend import assert_in_graph, num_replicas, on_accelerator, one_program
from keras_xent._types import Tensor
from keras_xent.kernels._compiled import on_clear_cache
from keras_xent.kernels._dtypes import accumulator_dtype, dtype_of
from keras_xent.kernels._masking import both
from keras_xent.kernels._shapes import as_rows, ensure_shape, reshape_to, same_shape
from keras_xent.kernels.reduction import reduce

# Of larger logits a second reading costs less than keeping the gradient. The second bound is for rows whose number is
# not known.
_MOST_BYTES, _MOST_CLASSES = 2**24, 1024
# Those to which it does not matter which rows belong together.
_REDUCTIONS = ("sum_over_batch_size", "mean", "mean_with_sample_weight", "sum", "token_mean")
_LABELS = ("bool", "uint8", "int32", "int64", "float32", "float64")

_NOWHERE = 2**31 - 1

_programs: dict[Any, Callable] = {}
on_clear_cache(_programs.clear)


class HasProgram:
    """What a loss says of its program; by default that it has none."""

    # The sentences of the error in a graph about the labels that `_bad_labels` finds; empty if there is none.
    _rule_of_labels = _advice_on_labels = ""

    def _key_of_program(self) -> tuple | None:
        """What the program depends on, beside the class and the reduction; None if there is to be no program."""
        return None

    def _labels_of_program(self, y_true: Tensor, logits: Tensor) -> Tensor:
        """The labels, of the shape of the logits with or without their classes; None if they do not fit."""
        if not same_shape(y_true.shape, logits.shape):
            return None
        return ensure_shape(y_true, logits, "`y_true` and `y_pred` must have the same shape.")

    def _bad_labels(self, y_true: Tensor, logits: Tensor, valid: Tensor) -> Tensor:
        """Which labels ask for an error, or in eager mode for a warning."""
        raise NotImplementedError


def reduced(
    loss: Any, y_true: Tensor, logits: Tensor, valid: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`(value, losses, valid)` of a loss; None where it is to be computed step by step.

    The losses, and which of them are valid, have the shape of the logits without the classes; both are None if no
    metric could ask for them.
    """
    if (
        not _backend.starts_programs(y_true, logits, weights)
        or num_replicas() > 1
        or on_accelerator()
        or _accumulation.is_active()
    ):
        return None
    if not _is_small(logits) or dtype_of(logits) == "float16" or loss.reduction not in _REDUCTIONS:
        return None
    key = loss._key_of_program()
    labels = None if key is None else loss._labels_of_program(y_true, logits)
    if key is None or labels is None or dtype_of(labels) not in _LABELS:
        return None
    # Each result of a program costs some microseconds.
    eager = all(one is None or _backend.is_concrete(one) for one in (logits, labels, valid, weights))
    checks = eager or bool(loss._rule_of_labels)
    publishes = not eager and _loss_statistics.has_consumers()
    key = (type(loss), loss.reduction, loss.normalizer, checks, publishes, *key)
    if key not in _programs:
        # A copy: what the key was made of may be assigned to the loss later, and shapes that are new are traced then.
        _programs[key] = one_program(_function(copy.copy(loss), checks, publishes))
    value, of_rows, bad = _programs[key](*_rows(logits, labels, valid, weights))
    if eager and int(bad[0]) < _NOWHERE:
        return None  # Step by step there is a sentence that says which.
    if not eager and checks:
        _assert_no(bad, loss, logits)
    losses, counted = (None if one is None else _without_classes(one, logits) for one in of_rows or (None, None))
    return value, losses, counted


def _assert_no(bad, loss, logits):
    position, label = bad
    message = [
        f"`{_words.names()[0]}` {loss._rule_of_labels}. Received: label",
        label,
        "at flat position",
        position,
        "and the number of classes",
        logits.shape[-1],
        loss._advice_on_labels,
    ]
    assert_in_graph(ops.equal(position, _NOWHERE), message)


def _without_classes(rows, logits):
    return rows if len(logits.shape) == 2 else reshape_to(rows, logits, without=len(logits.shape) - 1)


def _is_small(logits):
    *rows, classes = logits.shape
    size = 4 * (classes or 0)
    for number in rows:
        size *= 1 if number is None else number
    return bool(rows) and bool(size) and classes <= _MOST_CLASSES and size <= _MOST_BYTES


def _rows(logits, labels, valid, weights):
    lead = logits.shape[:-1]
    is_sparse = len(labels.shape) == len(lead)
    labels = ops.reshape(labels, (-1,)) if is_sparse else as_rows(labels, -1)
    weights = None if weights is None else ops.cast(weights, accumulator_dtype(logits))
    return as_rows(logits, -1), labels, _of_rows(valid, logits), _of_rows(weights, logits)


def _of_rows(array, logits):
    """`[n]` of an array that broadcasts against the logits without their classes; None of None."""
    lead = logits.shape[:-1]
    if array is None or (len(lead) == 1 and same_shape(array.shape, lead)):
        return array
    if not same_shape(array.shape, lead) or None in lead:
        array = ops.broadcast_to(array, ops.shape(logits)[:-1])
    return ops.reshape(array, (-1,))


def _function(loss, checks, publishes):
    def function(logits, labels, valid, weights, num_rows):
        if num_rows is not None:
            valid = both(valid, ops.arange(ops.shape(logits)[0], dtype="int32") < num_rows)
        unreduced = loss._unreduced_in_program(labels, logits, valid, weights)
        counted = both(unreduced.has_label, valid)
        value = reduce(
            unreduced.losses,
            reduction=loss.reduction,
            valid=counted,
            weights=weights,
            label_weights=unreduced.label_weights,
            normalizer=loss.normalizer,
        )
        # Under weight 0 a label may be anything.
        checked = both(valid, None if weights is None else ops.not_equal(weights, 0))
        bad = _first(labels, loss._bad_labels(labels, logits, checked)) if checks else None
        return value, (unreduced.losses, counted) if publishes else None, bad

    return function


def _first(labels, is_bad):
    """The flat position of the first label that is bad, and that label."""
    positions = ops.reshape(ops.arange(ops.size(is_bad), dtype="int32"), ops.shape(is_bad))
    position = ops.min(ops.where(is_bad, positions, _NOWHERE))
    flat = ops.reshape(labels, (-1,))
    return position, ops.take(flat, ops.minimum(position, ops.size(flat) - 1))
