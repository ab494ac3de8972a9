"""Checks of arguments: each returns the value as JSON can hold it, or raises an error that says what is allowed."""

import math
import re
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_xent import _keras

_CLASS = re.compile(r"-?\d+(\.0)?")  # as the key of a dict may name it
_FLOATS = ("bfloat16", "float16", "float32", "float64")


def boolean(name: str, value: Any) -> bool:
    """`value`, if it is True or False."""
    _refuse_variable(name, value)
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}.")
    return bool(value)


def fraction(name: str, value: Any) -> float:
    """`value`, if it is a number in [0, 1]."""
    return _number(name, value, "a number in [0, 1]", lambda number: 0 <= number <= 1)


def not_negative(name: str, value: Any) -> float:
    """`value`, if it is a finite number of at least 0."""
    return _number(name, value, "a number of at least 0", lambda number: 0 <= number < math.inf)


def positive(name: str, value: Any) -> float | None:
    """`value`, if it is None or a finite number above 0."""
    return None if value is None else _number(name, value, "None or a number above 0", lambda n: 0 < n < math.inf)


def above_zero(name: str, value: Any) -> float:
    """`value` as a float, if it is a finite number above 0."""
    return float(_number(name, value, "a number above 0", lambda number: 0 < number < math.inf))


def count(name: str, value: Any) -> int:
    """`value`, if it is a whole number of at least 1."""
    return int(_number(name, value, "a whole number of at least 1", lambda n: 1 <= n < math.inf and n == int(n)))


def _number(name, value, allowed, is_allowed):
    _refuse_variable(name, value)
    # TensorFlow compares no integer tensor with infinity.
    number = plain_number(value) if _is_number(value) else None
    if number is None or not is_allowed(number):
        raise ValueError(f"`{name}` must be {allowed}. Received: {name}={value!r}.")
    return number


def axis(value: Any) -> Any:
    """An integer of NumPy as one of Python. Anything else stays: whether it is an axis, the predictions will tell."""
    return int(value) if isinstance(value, np.integer) else value


def class_or_none(name: str, value: Any) -> int | None:
    """`value`, if it is None or a whole number."""
    _refuse_variable(name, value)
    if value is None:
        return None
    if not _is_number(value) or not math.isfinite(value) or value != int(value):
        # The second argument of the dense loss is the smoothing, that of the sparse one is not.
        hint = f" For label smoothing say label_smoothing={value!r}." if _is_number(value) and 0 < value < 1 else ""
        raise ValueError(
            f"`{name}` must be None or a whole number, the label that does not count. Received: {name}={value!r}.{hint}"
        )
    return int(value)


def label_or_none(name: str, value: Any) -> float | None:
    """`value`, if it is None, a finite number or nan."""
    allowed = "None or a number (nan is one), the label that does not count"
    return None if value is None else _number(name, value, allowed, lambda number: not math.isinf(number))


def class_weights(name: str, value: Any) -> Any:
    """Weights of classes: None, a list of numbers, a dict from class to number, or a variable, which is kept."""
    if is_variable(value):
        return _checked_variable(name, value, ranks=(1,), allowed="of shape [C], one number for each class")
    _refuse_variable(name, value)
    plain: Any = _list_of_numbers(value)
    if isinstance(value, dict) and all(map(_is_number, value.values())) and all(map(_CLASS.fullmatch, map(str, value))):
        # The keys are strings after a stay in JSON.
        plain = {int(float(label)): float(weight) for label, weight in value.items()}
    if value is not None and plain is None:
        raise ValueError(
            f"`{name}` must be None, a list with one number for each class, or a dict from class to number. "
            f"Received: {name}={value!r}."
        )
    return _of_at_least_0(name, value, plain)


def label_weights(name: str, value: Any) -> Any:
    """Weights of positive labels: None, a number for all of them, a list of numbers, or a variable, which is kept."""
    if is_variable(value):
        return _checked_variable(name, value, ranks=(0, 1), allowed="one number, or of shape [L]")
    _refuse_variable(name, value)
    plain = plain_number(value) if _is_number(value) else _list_of_numbers(value)
    if value is not None and plain is None:
        raise ValueError(
            f"`{name}` must be None, a number, or a list with one number for each label of an example. "
            f"Received: {name}={value!r}."
        )
    return _of_at_least_0(name, value, plain)


def is_variable(value: Any) -> bool:
    """Returns whether a value is a variable of Keras or TensorFlow."""
    return hasattr(value, "assign") and hasattr(value, "shape")


def numbers_of(value: Any) -> Any:
    """The numbers that a variable holds now, a list or a float; any other value as it is."""
    return ops.convert_to_numpy(value).tolist() if is_variable(value) else value


def _checked_variable(name, variable, *, ranks, allowed):
    if len(variable.shape) not in ranks:
        raise ValueError(
            f"`{name}` must be {allowed}, where it is a variable. Received: a variable of shape "
            f"{tuple(variable.shape)}."
        )
    _of_at_least_0(name, variable, np.ravel(numbers_of(variable)).tolist())
    return variable


def _of_at_least_0(name, value, plain):
    numbers = plain.values() if isinstance(plain, dict) else plain if isinstance(plain, list) else [plain or 0.0]
    # Written so that NaN does not pass.
    if not all(number >= 0 for number in numbers):
        raise ValueError(f"`{name}` must hold numbers of at least 0. Received: {name}={value!r}.")
    return plain


def _list_of_numbers(value):
    """A flat list of floats, or None if the value is none."""
    if value is None or isinstance(value, (str, dict)):
        return None
    try:
        array = np.asarray(value if isinstance(value, (list, tuple)) else ops.convert_to_numpy(value))
        return array.astype("float64").tolist() if array.ndim == 1 and array.dtype.kind not in "USOc" else None
    except (TypeError, ValueError):
        return None


def dtype_or_none(name: str, value: Any) -> str | None:
    """The name of a dtype or policy whose numbers are floats, or None."""
    if value is None:
        return None
    try:
        policy = keras.dtype_policies.get(value)
        computed = policy.compute_dtype
    except (AttributeError, TypeError, ValueError):
        computed = None
    if computed not in _FLOATS:
        raise ValueError(
            f"`{name}` must be None or one of {', '.join(map(repr, _FLOATS))}. Received: {name}={value!r}."
        )
    return policy.name


def tensor(name: str, value: Any) -> Any:
    """`value`, if it holds numbers in the usual way. Otherwise a framework would refuse it in words of its own."""
    kind = type(value).__name__
    if isinstance(value, (list, tuple, str)):
        try:
            dtype = np.asarray(value).dtype.name
        except ValueError:
            kind, dtype = "uneven list", ""
    else:
        dtype = str(getattr(getattr(value, "dtype", None), "name", getattr(value, "dtype", "")))
    if value is None:
        what, fix = "None", "Give an array of numbers."
    elif isinstance(value, dict):
        what, fix = "a dict", "Give each loss the entry of its own output."
    elif isinstance(value, keras.KerasTensor):
        what = "a symbolic KerasTensor, which has no values"
        fix = "Give the loss to `compile`, or call it in the `call` of a layer, with `self.add_loss(loss(...))`."
    elif kind in ("RaggedTensor", "uneven list"):
        what = "a ragged tensor" if kind == "RaggedTensor" else "a list of rows of uneven length"
        fix = "Pad it{} and mark the padding with a mask or `ignore_class`."
        fix = fix.format(" with `.to_tensor()`" if kind == "RaggedTensor" else "")
    elif kind == "SparseTensor" or hasattr(value, "todense"):
        what = "a sparse tensor"
        fix = f"Make it dense with `{'tf.sparse.to_dense' if kind == 'SparseTensor' else '.todense()'}`."
    elif getattr(getattr(value, "shape", None), "rank", 0) is None:
        what = "a tensor whose number of dimensions is not known"
        fix = (
            "Give it a shape where it is made, for instance `labels.set_shape([None])` after `tf.py_function`, and "
            "every batch the same number of dimensions."
        )
    elif dtype.startswith("complex"):
        what, fix = f"dtype {dtype}", "Take its real part or its absolute value."
    elif dtype == "object" and (numbers := _numbers_of_objects(value)) is not None:
        return numbers
    elif not hasattr(value, "shape") and hasattr(value, "logits"):
        what, fix = f"an object of class {kind}", "Give its `logits`."
    elif dtype.startswith(("str", "bytes", "object")):
        what = "dtype object" if dtype == "object" else "strings"
        fix = "Turn names into integers first, for instance with `keras.layers.StringLookup`."
    else:
        return value
    raise ValueError(f"`{name}` must be a dense tensor of numbers. Received: {what}. {fix}")


def _numbers_of_objects(value):
    """The numbers of an array that holds Python's own, as a column of a table may; None if one is something else."""
    items = np.asarray(value).tolist()
    return np.asarray(items) if all(map(_is_number, np.ravel(np.asarray(items, object)))) else None


def _refuse_variable(name, value):
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for one in (value, *parts):
        # A variable of Keras or TensorFlow, or a tensor that is being traced.
        if hasattr(one, "assign") or (hasattr(one, "shape") and not _has_value(one)):
            raise ValueError(
                f"`{name}` must be numbers that are known when the loss is made. Received: {type(one).__name__}. The "
                "value becomes part of the compiled step, which would go on with it after the variable has changed. To "
                "change it while a model trains, compile the model again with another loss; sample weights may change "
                "at every step, and so may a variable given as `class_weight` or `pos_weight`."
            )


def _has_value(tensor):
    try:
        np.asarray(tensor)
    except Exception:  # each framework has an error of its own
        return False
    return True


def _is_number(value):
    if isinstance(value, (bool, np.bool_, str)):
        return False
    return isinstance(value, (int, float)) or getattr(value, "shape", None) == () and hasattr(value, "__float__")


def plain_number(number: Any) -> Any:
    """A number as one of Python: an array or tensor of one number has no hash, and JSON does not hold it."""
    if hasattr(number, "item"):
        return number.item()
    return float(number) if hasattr(number, "shape") else number


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line of the user's own program: the one that called the loss or the metric, or `fit`."""
    warnings.warn(message, category, stacklevel=_keras.stacklevel_of_user())
