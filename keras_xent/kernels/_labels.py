"""Labels: which are valid, whether they are in range, and the weights of their classes."""

import math
from typing import Any

import numpy as np
from keras import ops

from keras_xent import _keras, _words, arguments
from keras_xent._backend import (
    assert_in_graph,
    asserts_in_graph,
    is_eager,
    on_accelerator,
    reads_variables_once,
    snapshot,
    widest_int,
)
from keras_xent._types import Tensor
from keras_xent.kernels._dtypes import accumulator_dtype, dtype_of, is_float
from keras_xent.kernels._masking import both
from keras_xent.kernels._shapes import align_weights, ensure_size, same_shape


def valid_mask(labels: Tensor, mask: Tensor, ignore_class: float | None) -> Tensor:
    """True where a label is valid: the mask allows it and it is not `ignore_class`. None where all are."""
    # From the left, as weights: broadcasting would take a mask of examples for one of time steps.
    valid = align_weights(mask, labels.shape, "mask")
    if ignore_class is not None:
        valid = both(valid, ops.logical_not(equals_ignored(labels, ignore_class)))
    return valid


def equals_ignored(labels: Tensor, ignore_class: float) -> Tensor:
    """True where `labels` equals `ignore_class`, a number or nan."""
    if isinstance(ignore_class, float) and math.isnan(ignore_class):
        return ops.isnan(labels) if is_float(labels) else ops.zeros_like(labels, dtype="bool")
    if not is_float(labels):
        # Compared as int64, so that -1 never meets 255 in uint8. Infinity is no integer.
        if not math.isfinite(ignore_class) or ignore_class != int(ignore_class):
            return ops.zeros_like(labels, dtype="bool")
        integers, label = _widen(labels), int(ignore_class)
        if dtype_of(labels) in ("uint32", "uint64"):
            if label < 0:
                return ops.zeros_like(labels, dtype="bool")
            # Of what no signed integer can hold, both have wrapped around.
            largest = int(np.iinfo(dtype_of(labels)).max)
            return ops.equal(integers, int(np.array(min(label, largest), dtype_of(labels)).astype(dtype_of(integers))))
        limits = np.iinfo(dtype_of(integers))
        # JAX has clipped what is larger, see `to_tensor`.
        return ops.equal(integers, min(max(label, int(limits.min)), int(limits.max)))
    return ops.equal(labels, ops.cast(ignore_class, labels.dtype))


def class_indices(labels: Tensor, num_classes: Any, valid: Tensor) -> Tensor:
    """int32 labels in `[0, num_classes)`, or -1 where a valid label is out of range, never cast to a float type.

    A valid label that is out of range is an error in eager mode and in a TensorFlow graph on the CPU. Where values
    cannot be read (inside XLA), or reading them would make an accelerator wait, the -1 becomes a NaN loss in the
    kernel.
    """
    if is_eager(labels) and (valid is None or is_eager(valid)) and _are_all_classes(labels, int(num_classes)):
        return ops.cast(labels, "int32")
    is_class, integers = _in_range(labels, num_classes)
    bad = both(ops.logical_not(is_class), valid)
    if is_eager(bad):
        if bool(ops.any(bad)):
            raise ValueError(_describe_bad_label(labels, bad, int(num_classes), valid))
    elif asserts_in_graph():
        _assert_in_range(labels, bad, num_classes)
    if valid is None:
        return ops.cast(ops.where(is_class, integers, -1), "int32")
    # Class 0 where the label does not count: a NaN that is selected away would alarm those who look for NaN.
    out_of_range = ops.where(bad, ops.full_like(integers, -1), ops.zeros_like(integers))
    # The cast comes before any compiled function: int16 labels inside one abort XLA:CPU of TensorFlow 2.21.
    return ops.cast(ops.where(is_class, integers, out_of_range), "int32")


def _are_all_classes(labels, num_classes):
    """Returns whether integers are all indices of classes, computed on the CPU, where reading them costs least."""
    if is_float(labels) or on_accelerator():
        return False
    values = ops.convert_to_numpy(labels)
    return values.dtype.kind in "iu" and (not values.size or bool(values.min() >= 0 and values.max() < num_classes))


def in_range(labels: Tensor, num_classes: Any) -> Tensor:
    """True where a label is the index of a class."""
    return _in_range(labels, num_classes)[0]


def _in_range(labels, num_classes):
    """Returns which labels are indices of classes, and the labels as integers."""
    if not is_float(labels):
        integers = _widen(labels)
        return ops.logical_and(integers >= 0, integers < ops.cast(num_classes, integers.dtype)), integers
    integers = ops.cast(ops.where(ops.isfinite(labels), labels, -1), widest_int())
    is_class = ops.logical_and(integers >= 0, integers < ops.cast(num_classes, integers.dtype))
    return ops.logical_and(is_class, ops.equal(ops.cast(integers, labels.dtype), labels)), integers


def _widen(labels):
    return ops.cast(labels, widest_int() if dtype_of(labels) in ("int64", "uint64", "uint32") else "int32")


def _first_bad(labels, bad):
    """The first bad label, and a sentence with it."""
    bad = ops.convert_to_numpy(bad)
    position = tuple(int(i) for i in np.argwhere(bad)[0])
    label = ops.convert_to_numpy(labels)[position].item()
    return label, f"Received: label {label} at position {position}, and {int(bad.sum())} such label(s) in all."


def _describe_bad_label(labels, bad, num_classes, valid):
    label, received = _first_bad(labels, bad)
    name, predicted, padding, one_hot = _words.words()
    rule = f"`{name}` must be classes from 0 to {num_classes - 1}, since `{predicted}` has {num_classes}"
    if math.isnan(label):
        fix = f"For a missing label give a whole number, such as -1, and {padding.format(label=-1)}."
    elif label != int(label):
        rule = f"`{name}` must be whole numbers, the index of one class each"
        fix = one_hot.replace("one-hot or soft", "soft")
    elif num_classes == 1:
        fix = "For a yes-or-no answer of one unit use the binary loss, BinaryCrossentropy."
    else:
        fix = f"If it marks padding, {padding.format(label=int(label))}."
        zeros = ops.equal(labels, 0)
        if label == num_classes and not bool(ops.any(both(zeros, valid))):
            fix = f"If labels count from 1, subtract 1. {fix}"
    return f"{rule}. {received} {fix}"


def are_out_of_range(labels: Tensor, num_classes: Any, valid: Tensor) -> Tensor:
    """True for valid labels that are no index of a class."""
    return both(ops.logical_not(in_range(labels, num_classes)), valid)


def _assert_in_range(labels, bad, num_classes):
    name, _, padding, _ = _words.words()

    def received():
        # An empty batch has no first element to show, so one is added.
        flat = ops.cast(ops.reshape(bad, (-1,)), "int32")
        first = ops.argmax(ops.concatenate([flat, ops.zeros((1,), "int32")]))
        shown = ops.concatenate([ops.reshape(labels, (-1,)), ops.zeros((1,), labels.dtype)])
        return [
            f"`{name}` must be classes from 0 to the number of classes less 1. Received: label",
            ops.take(shown, first),
            "at flat position",
            first,
            "and the number of classes",
            num_classes,
            f"(if it marks padding, {padding.replace('={label}', '')})",
        ]

    return assert_in_graph(ops.logical_not(ops.any(bad)), received)


# Soft labels may be rounded, and may be noisy: "1 + 0.05 u" and "0.7 to 1.2" are used to train adversarial networks.
# -1, 2 and 255, which mark something else, are far away.
SOFT_LABELS = (-0.21, 1.21)


def is_soft_label(labels: Tensor) -> Tensor:
    """True for binary labels that are taken as numbers from 0 to 1, False for NaN."""
    return ops.logical_and(labels >= SOFT_LABELS[0], labels <= SOFT_LABELS[1])


def check_binary(labels: Tensor, valid: Tensor) -> None:
    """Raises an error for labels outside [0, 1] where `valid` (None: all), wherever `class_indices` does.

    Elsewhere the kernel makes NaN of their row. `SOFT_LABELS` says how far outside a label may be that is a float.
    """
    # JAX has no minimum of nothing.
    if dtype_of(labels) == "bool" or 0 in labels.shape:
        return
    if valid is not None:
        labels = ops.where(valid, labels, ops.zeros_like(labels))
    name, _ = _words.names()
    if is_eager(labels):
        bad = are_not_binary(labels, None)
        if bool(ops.any(bad)):
            label, received = _first_bad(labels, bad)
            marker = 'float("nan")' if math.isnan(label) else label
            raise ValueError(
                f"`{name}` must be numbers from 0 to 1. {received} If it marks a missing label, say so with "
                f"`ignore_class={marker}`; if not, convert the labels to 0 and 1."
            )
        return
    # Two numbers, which cost one reading of the labels each; the position would cost far more.
    lowest, highest = ops.min(labels), ops.max(labels)
    low, high = _limits(labels)
    assert_in_graph(
        ops.logical_and(lowest >= low, highest <= high),
        lambda: [
            f"`{name}` must be numbers from 0 to 1. Received: labels from",
            lowest,
            "to",
            highest,
            "(if one of them marks a missing label, say so with `ignore_class`)",
        ],
    )


def are_not_binary(labels: Tensor, valid: Tensor) -> Tensor:
    """True for valid labels that `check_binary` refuses."""
    if dtype_of(labels) == "bool":
        return ops.zeros_like(labels)
    low, high = _limits(labels)
    return both(ops.logical_not(ops.logical_and(labels >= low, labels <= high)), valid)


def _limits(labels):
    return SOFT_LABELS if is_float(labels) else (0, 1)


def class_weights(class_weight: Any, num_classes: Any, dtype: str, rank: int) -> Tensor:
    """The class weights as a tensor that broadcasts against `as_rows(logits)`; a dict holds those that are not 1."""
    if isinstance(class_weight, dict):
        if not isinstance(num_classes, int):
            raise ValueError(
                "`class_weight` must hold one weight for each class where the number of classes of "
                f"`{_words.names()[1]}` is not known before the step runs. Received: a dict."
            )
        weights = np.ones(num_classes)
        for label, weight in class_weight.items():
            if not 0 <= int(label) < num_classes:
                raise ValueError(
                    f"`class_weight` must name classes from 0 to {num_classes - 1}. Received: class {label!r}."
                )
            weights[int(label)] = weight
        class_weight = weights
    weights = weights_tensor("class_weight", class_weight, dtype)
    if not same_shape(weights.shape, (num_classes if isinstance(num_classes, int) else None,)):
        raise ValueError(
            f"`class_weight` must hold one weight for each of the {num_classes} classes of `{_words.names()[1]}`. "
            f"Received: class_weight of shape {tuple(weights.shape)}."
        )
    weights = ensure_size(weights, num_classes, "`class_weight` must hold one weight for each class.")
    return ops.reshape(weights, (1, -1) + (1,) * (rank - 2))


def optional_class_weights(class_weight: Any, num_classes: Any, logits: Tensor, rank: int) -> tuple[Tensor, ...]:
    """The class weights as a tuple of one tensor, or of none."""
    if class_weight is None:
        return ()
    return (class_weights(class_weight, num_classes, accumulator_dtype(logits), rank),)


def weights_tensor(name: str, weights: Any, dtype: str) -> Tensor:
    """Weights of classes as a tensor; of a variable its present value, which gets no gradient."""
    if not arguments.is_variable(weights):
        return ops.convert_to_tensor(weights, dtype=dtype)
    scope = _keras.stateless_scope()
    is_input = scope is not None and scope.get_current_value(weights) is not None
    if reads_variables_once() and not is_input and not _keras.is_building():
        raise ValueError(
            f"`{name}` is a variable that this compiled step does not have among its inputs: JAX would go on with its "
            "present value after it has changed. Make it a weight of the model, in a layer of yours with "
            "`self.add_weight(..., trainable=False)`, or give numbers."
        )
    return ops.stop_gradient(ops.cast(snapshot(weights), dtype))


def gather_class_weights(class_weight: Tensor, labels: Tensor) -> Tensor:
    """The weight of each label's class; `labels` are indices, of which those below 0 take class 0's. None of None."""
    return None if class_weight is None else ops.take(ops.reshape(class_weight, (-1,)), ops.maximum(labels, 0))
