"""What kernels need to know of their targets: which ones count, whether labels are classes, weights of classes."""

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from keras import ops

from keras_xent.kernels._compile import assert_in_graph, is_eager, widest_int

_NAMES = contextvars.ContextVar("_NAMES", default=("labels", "logits"))


@contextlib.contextmanager
def called(labels: str, logits: str) -> Iterator[None]:
    """Errors speak of labels and logits by these names: those of the arguments that the caller's caller has given."""
    token = _NAMES.set((labels, logits))
    try:
        yield
    finally:
        _NAMES.reset(token)


def dtype_of(tensor: Any) -> str:
    """The name of a tensor's dtype, the same on every backend."""
    return str(getattr(tensor.dtype, "name", tensor.dtype))


def is_float(tensor: Any) -> bool:
    """Whether the tensor's dtype is a float type, bfloat16 included."""
    return "float" in dtype_of(tensor)


def to_tensor(value: Any) -> Any:
    """A tensor of the value's own dtype; a variable is read, a list becomes an array first."""
    if isinstance(value, (list, tuple, int, float, bool)):
        value = np.asarray(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and widest_int() == "int32":
        # Wider integers would wrap around, and a label of 2^32 become class 0.
        value = np.clip(value, np.iinfo("int32").min, np.iinfo("int32").max)
    return ops.convert_to_tensor(value)


def accumulator_dtype(logits: Any) -> str:
    """float64 for float64 logits, float32 for all others."""
    return "float64" if dtype_of(logits) == "float64" else "float32"


def largest(tensor: Any) -> float:
    """The largest finite number of the tensor's dtype (float32 or float64)."""
    return float(np.finfo(dtype_of(tensor)).max)


def as_rows(tensor: Any, axis: int) -> Any:
    """The tensor with its class axis second: `[rows, classes]` for a last axis, else `[outer, classes, inner]`."""
    axis = axis % len(tensor.shape)
    shape = ops.shape(tensor)
    if axis == len(shape) - 1:
        return ops.reshape(tensor, (-1, shape[axis]))
    return ops.reshape(tensor, (math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])))


def along_rows(tensor: Any, axis: int, rank: int) -> Any:
    """A tensor without the class axis, shaped so that it broadcasts against `as_rows(logits, axis)`."""
    axis = axis % rank
    shape = ops.shape(tensor)
    if axis == rank - 1:
        return ops.reshape(tensor, (-1, 1))
    return ops.reshape(tensor, (math.prod(shape[:axis]), 1, math.prod(shape[axis:])))


def checked_axis(axis: Any, rank: int, name: str = "logits") -> int:
    """The axis counted from the front, if there is one."""
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)) or not -rank <= axis < rank:
        raise ValueError(
            f"`axis` must be an integer from {-rank} to {rank - 1} for {name} of {rank} dimensions. "
            f"Received: axis={axis!r}."
        )
    return int(axis) % rank


def without_class_axis(labels: Any, logits: Any, axis: int, *, hidden: Any = None) -> Any:
    """Labels of the shape of `logits` without its class axis; a class axis of size 1 is dropped.

    Sizes that are not known before the step runs are taken from `hidden`, the hidden states, where logits are not to be
    made: a graph would make them for their shape alone.
    """
    rank = len(logits.shape)
    if len(labels.shape) == rank and labels.shape[axis] == 1:
        labels = ops.squeeze(labels, axis=axis)
    expected = tuple(size for i, size in enumerate(logits.shape) if i != axis % rank)
    if not same_shape(labels.shape, expected):
        called, predicted = _NAMES.get()
        raise ValueError(
            f"`{called}` must have the shape of `{predicted}` without its class axis, one integer for each "
            f"distribution. Received: {called} of shape {tuple(labels.shape)} and {predicted} of shape "
            f"{tuple(logits.shape)} with class axis {axis % rank}, so {called} of shape {expected} are needed."
            f"{_advice_on_shapes(tuple(labels.shape), tuple(logits.shape), predicted)}"
        )
    labels = asserted_to_fit(
        labels,
        logits if hidden is None else hidden,
        "`labels` must have the shape of `logits` without its class axis.",
        without=axis % rank,
    )
    return labels


def _advice_on_shapes(labels, logits, predicted):
    if same_shape(labels, logits):
        return " For one-hot or soft targets use the categorical loss."
    other = [i for i in range(len(logits)) if same_shape(labels, logits[:i] + logits[i + 1 :])]
    return f" They fit class axis {other[0]}: move that axis of `{predicted}` to the end." if other else ""


def same_shape(one: Any, other: Any) -> bool:
    """Whether two static shapes may be the same; None stands for any size."""
    one, other = tuple(one), tuple(other)
    return len(one) == len(other) and all(a is None or b is None or a == b for a, b in zip(one, other, strict=True))


def asserted_to_fit(
    tensor: Any, like: Any, sentence: str, *, without: int | None = None, may_repeat: bool = False
) -> Any:
    """The tensor; in a TensorFlow graph on the CPU after an assertion that unknown sizes are those of `like`.

    A tensor of size 1 would else be repeated silently; with `may_repeat` it may be, but not along the first axis.
    `without` is an axis of `like` that the tensor does not have.
    """
    known, sizes = ([size for i, size in enumerate(shape) if i != without] for shape in (like.shape, ops.shape(like)))
    given = ops.shape(tensor)
    fits = [
        ops.logical_or(ops.equal(a, b), ops.equal(a, 1)) if may_repeat and i else ops.equal(a, b)
        for i, (a, b) in enumerate(zip(given, sizes, strict=True))
        if tensor.shape[i] is None or known[i] is None
    ]
    if not fits:
        return tensor
    told = [f"{sentence} Received: shape", *given, "where", *sizes, "is needed."]
    return assert_in_graph(ops.all(ops.stack(fits)), told, tensor)


def counted(labels: Any, mask: Any, ignore_class: Any) -> Any:
    """True where a label counts: the mask allows it and it is not `ignore_class`. None where all count."""
    valid = None if mask is None else ops.cast(mask, "bool")
    if ignore_class is not None:
        kept = ops.logical_not(is_class(labels, ignore_class))
        valid = kept if valid is None else ops.logical_and(valid, kept)
    return valid


def is_class(labels: Any, ignore_class: Any) -> Any:
    """True where `labels` equals `ignore_class`, a number or nan."""
    if isinstance(ignore_class, float) and math.isnan(ignore_class):
        return ops.isnan(labels) if is_float(labels) else ops.zeros_like(labels, dtype="bool")
    if not is_float(labels):
        # Compared as int64, so that -1 never meets 255 in uint8. Infinity has no integer, and equals none.
        if not math.isfinite(ignore_class) or ignore_class != int(ignore_class):
            return ops.zeros_like(labels, dtype="bool")
        return ops.equal(_wide(labels), int(ignore_class))
    return ops.equal(labels, ops.cast(ignore_class, labels.dtype))


def class_indices(labels: Any, num_classes: Any, valid: Any) -> Any:
    """int32 labels in `[0, num_classes)`, or -1 where a label is no class. Labels are never cast to a float type.

    A counted label that is no class is an error in eager mode and in a TensorFlow graph on the CPU. Where values cannot
    be looked at (inside XLA) or looking would make an accelerator wait, the -1 becomes a NaN loss in the kernel.
    """
    good, whole, is_whole = _classes(labels, num_classes)
    bad = ops.logical_not(good) if valid is None else ops.logical_and(ops.logical_not(good), valid)
    if is_eager(bad):
        if bool(ops.any(bad)):
            raise ValueError(_bad_label(labels, bad, int(num_classes), valid))
    else:
        _assert_labels(labels, bad, num_classes)
    # The cast comes before any compiled function: int16 labels inside one abort XLA:CPU of TensorFlow 2.21.
    return ops.cast(ops.where(good, whole, ops.full_like(whole, -1)), "int32")


def are_classes(labels: Any, num_classes: Any) -> Any:
    """True where a label is the index of a class."""
    return _classes(labels, num_classes)[0]


def _classes(labels, num_classes):
    """Where labels are classes; the labels as integers; where they are whole (None: they are integers)."""
    if is_float(labels):
        whole = ops.cast(ops.where(ops.isfinite(labels), labels, -1), widest_int())
        is_whole = ops.equal(ops.cast(whole, labels.dtype), labels)
    else:
        whole, is_whole = _wide(labels), None
    good = ops.logical_and(whole >= 0, whole < ops.cast(num_classes, whole.dtype))
    return good if is_whole is None else ops.logical_and(good, is_whole), whole, is_whole


def _wide(labels):
    return ops.cast(labels, widest_int() if dtype_of(labels) in ("int64", "uint64", "uint32") else "int32")


def _first_bad(labels, bad):
    """The first bad label, and the words that say so."""
    bad = ops.convert_to_numpy(bad)
    position = tuple(int(i) for i in np.argwhere(bad)[0])
    label = ops.convert_to_numpy(labels)[position].item()
    return label, f"Received: label {label} at position {position}, and {int(bad.sum())} such label(s) in all."


def _bad_label(labels, bad, num_classes, valid):
    label, received = _first_bad(labels, bad)
    name, predicted = _NAMES.get()
    rule = f"`{name}` must be classes from 0 to {num_classes - 1}, since `{predicted}` has {num_classes}"
    if math.isnan(label):
        fix = "For a missing label give a whole number, such as -1, and say so with `ignore_class=-1`."
    elif label != int(label):
        rule = f"`{name}` must be whole numbers, the index of one class each"
        fix = "For soft targets use the categorical loss."
    else:
        fix = f"If it marks padding, say so with `ignore_class={int(label)}`."
        zeros = ops.equal(labels, 0)
        if label == num_classes and not bool(ops.any(zeros if valid is None else ops.logical_and(zeros, valid))):
            fix = f"If labels count from 1, subtract 1. {fix}"
    return f"{rule}. {received} {fix}"


def _assert_labels(labels, bad, num_classes):
    flat = ops.cast(ops.reshape(bad, (-1,)), "int32")
    # An empty batch has no first element to show, so one is added.
    first = ops.argmax(ops.concatenate([flat, ops.zeros((1,), "int32")]))
    shown = ops.concatenate([ops.reshape(labels, (-1,)), ops.zeros((1,), labels.dtype)])
    assert_in_graph(
        ops.logical_not(ops.any(bad)),
        [
            f"`{_NAMES.get()[0]}` must be classes from 0 to the number of classes less 1. Received: label",
            ops.take(shown, first),
            "at flat position",
            first,
            "and the number of classes",
            num_classes,
            "(if it marks padding, say so with `ignore_class`)",
        ],
    )


def check_binary(labels: Any, present: Any) -> None:
    """Refuses labels outside [0, 1] where `present` is True (None: all), wherever `class_indices` would."""
    # JAX has no least of nothing.
    if dtype_of(labels) == "bool" or 0 in labels.shape:
        return
    if present is not None:
        labels = ops.where(present, labels, ops.zeros_like(labels))
    name, _ = _NAMES.get()
    low: float = 0
    high: float = 1
    if is_float(labels):
        # Soft labels have been computed, and rounded.
        slack = 1e-2 if "16" in dtype_of(labels) else 1e-6
        low, high = -slack, 1 + slack
    if is_eager(labels):
        bad = ops.logical_not(ops.logical_and(labels >= low, labels <= high))
        if bool(ops.any(bad)):
            label, received = _first_bad(labels, bad)
            marker = 'float("nan")' if math.isnan(label) else label
            raise ValueError(
                f"`{name}` must be numbers from 0 to 1. {received} If it marks a missing label, say so with "
                f"`ignore_class={marker}`; if not, bring the labels to 0 and 1."
            )
        return
    # Two numbers, which cost one reading of the labels each; the position would cost far more.
    lowest, highest = ops.min(labels), ops.max(labels)
    assert_in_graph(
        ops.logical_and(lowest >= low, highest <= high),
        [
            f"`{name}` must be numbers from 0 to 1. Received: labels from",
            lowest,
            "to",
            highest,
            "(if one of them marks a missing label, say so with `ignore_class`)",
        ],
    )


def class_weights(class_weight: Any, num_classes: Any, dtype: str, rank: int) -> Any:
    """The class weights as a tensor that broadcasts against `as_rows(logits)`; a dict gives the ones that are not 1."""
    if isinstance(class_weight, dict):
        weights = np.ones(int(num_classes))
        for label, weight in class_weight.items():
            if not 0 <= int(label) < num_classes:
                raise ValueError(
                    f"`class_weight` must name classes from 0 to {int(num_classes) - 1}. Received: class {label!r}."
                )
            weights[int(label)] = weight
        class_weight = weights
    weights = ops.convert_to_tensor(class_weight, dtype=dtype)
    if len(weights.shape) != 1 or not same_shape(
        weights.shape, (num_classes if isinstance(num_classes, int) else None,)
    ):
        raise ValueError(
            f"`class_weight` must hold one weight for each of the {num_classes} classes of `{_NAMES.get()[1]}`. "
            f"Received: class_weight of shape {tuple(weights.shape)}."
        )
    return ops.reshape(weights, (1, -1) + (1,) * (rank - 2))


def aligned_weights(
    weights: Any, shape: Any, what: str = "sample_weight", *, like: Any = None, without: int | None = None
) -> Any:
    """Weights with dimensions of size 1 added at the end, so that they broadcast against losses of shape `shape`.

    For losses `[B, T]` these fit: a scalar, `[B]`, `[B, 1]`, `[B, T]`, and `[B, T, 1]`. Weights line up from the left:
    `[B]` weighs examples, never time steps. Sizes that are not known yet are asserted to be those of `like`, if it is
    given, but for its axis `without`.
    """
    shape, given = tuple(shape), tuple(weights.shape)
    if not given:
        return weights
    if len(given) == len(shape) + 1 and given[-1] == 1:
        weights = ops.squeeze(weights, axis=-1)
    elif len(given) < len(shape):
        weights = ops.reshape(weights, ops.shape(weights) + (1,) * (len(shape) - len(given)))
    fits = len(weights.shape) == len(shape) and all(
        w is None or s is None or w == s or (w == 1 and i > 0)
        for i, (w, s) in enumerate(zip(weights.shape, shape, strict=True))
    )
    if not fits:
        allowed = [(), *(shape[: i + 1] for i in range(len(shape))), (*shape, 1)]
        if len(shape) > 1:
            allowed.insert(2, (shape[0], 1))
            fix = "For one weight per example give shape [batch] or [batch, 1]; for one per time step [batch, time]."
        else:
            fix = "Give one weight per example."
        raise ValueError(
            f"`{what}` must line up from the left with the losses, which have shape {shape}: it may have shape "
            f"{' or '.join(map(str, allowed))}. Received: {what} of shape {given}. {fix}"
        )
    if like is not None:
        rule = f"`{what}` must line up from the left with the losses: [batch], [batch, 1] or [batch, time]."
        weights = asserted_to_fit(weights, like, rule, without=without, may_repeat=True)
    return weights
