"""Comparing a call with what is expected of it, and making one that fails small."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tools.fuzzing.calls import Call
from tools.fuzzing.expected import Limits
from tools.fuzzing.kernels import KERNELS

_LARGEST = {"float64": 1.7976931348623157e308, "float16": 65504.0, "bfloat16": 3.3895e38}
# What is computed from numbers below the smallest normal one, 1.2e-38, which may be taken for 0.
_SMALLEST = 1e-36


def check(call: Call, run: Callable) -> tuple[int, list[str]]:
    """Returns the number of cases of the call, and the faults that were found."""
    with np.errstate(all="ignore"):
        expected = KERNELS[call.program.kernel].expected(call)
    try:
        values, gradients = run(call)
    except Exception as error:
        from tools.fuzzing.running import is_expected_error

        if expected.raises and is_expected_error(error):
            return 1, []
        return 1, [f"raised {type(error).__name__}: {str(error)[:300]}"]
    if expected.raises:
        return 1, ["a label out of range raised no error"]
    return expected.cases, _differences(call, expected, values, gradients)


def _differences(call, expected, values, gradients):
    found = []
    for i, (value, limits) in enumerate(zip(values, expected.values, strict=True)):
        found += _compare(f"value {i}", value, limits, "float64" if call.program.dtype == "float64" else "float32")
    for name, limits in expected.gradients.items():
        axis = call.program.get("axis", -1) if call.program.kernel in ("softmax", "sparse_softmax") else -1
        found += _compare(f"gradient for {name}", gradients[name], limits, call.program.dtype, axis)
    return found


def _compare(what: str, actual: np.ndarray, limits: Limits, dtype: str, axis: int = -1) -> list[str]:
    if actual.shape != limits.value.shape:
        return [f"{what} has shape {actual.shape} instead of {limits.value.shape}"]
    largest = _LARGEST.get(dtype, 3.4028235e38)
    with np.errstate(all="ignore"):
        # What has no number in the dtype is infinite, or the largest number.
        value = np.where(np.abs(limits.value) > largest, np.sign(limits.value) * np.inf, limits.value)
        # A sum may be larger than what it is divided by afterwards leaves of it.
        near_largest = np.isfinite(value) & (np.abs(value) > largest * (1 - 2**-8 if dtype == "float16" else 1e-4))
        near_largest = near_largest | (np.isinf(value) & np.isfinite(limits.value))
        close = np.abs(actual - value) <= limits.tolerance + _SMALLEST
        same = (actual == value) | (np.isnan(actual) & np.isnan(value))
        overflown = near_largest & (np.abs(actual) >= largest * (1 - 2**-7)) & (np.sign(actual) == np.sign(value))
        right = close | same | overflown
        # Of a row without a derivative some entries may be limits; NaN is to be among them.
        if what.startswith("gradient") and actual.ndim > 1:
            lost = np.isnan(value).any(axis, keepdims=True)
            right = np.where(lost, np.isnan(actual).any(axis, keepdims=True), right)
        right = right | np.isposinf(limits.tolerance)
    if right.all():
        return []
    wrong = np.argwhere(~right)
    at = tuple(int(i) for i in wrong[0])
    return [
        f"{what}: {len(wrong)} of {right.size} wrong, first at {list(at)}: {actual[at]!r} instead of {value[at]!r}, "
        f"within {np.broadcast_to(limits.tolerance, right.shape)[at]:.3g}"
    ]


# Without these the arrays would have other shapes; what masks and weights leave out may hold anything.
_SHAPES = ("axis", "reduction", "transpose_kernel", "transpose_teacher_kernel")


def shrunk(call: Call, fails: Callable[[Call], bool]) -> Call:
    """A smaller call that still fails: fewer options and arrays, one row if it is enough, and rows of 0 else.

    Greedy, in few programs: each is compiled. Rows need none.
    """
    for option, _ in call.program.options:
        if option not in _SHAPES:
            options = tuple(one for one in call.program.options if one[0] != option)
            call = _first_that_fails(fails, Call(replace(call.program, options=options), call.arrays), call)
    for name in sorted(call.program.given - {"mask", "token_weights", "valid", "weights"}):
        arrays = {n: a for n, a in call.arrays.items() if n != name}
        program = replace(call.program, given=call.program.given - {name})
        call = _first_that_fails(fails, Call(program, arrays), call)
    low, high = 0, _rows(call)
    while high - low > 1:
        middle = (low + high) // 2
        halves = [(low, middle), (middle, high)]
        half = next((half for half in halves if fails(_zero_outside(call, *half))), None)
        if half is None:
            break
        low, high = half
    call = _zero_outside(call, low, high) if high - low < _rows(call) else call
    return _first_that_fails(fails, _one_row(call, low), call) if high - low == 1 else call


def _first_that_fails(fails, candidate, otherwise):
    return candidate if fails(candidate) else otherwise


def _rows(call):
    return call.arrays[KERNELS[call.program.kernel].differentiated[0]].shape[0]


def _by_rows(call):
    """The names of arrays whose first axis is that of the rows; none where the class axis is the first."""
    first, rows = KERNELS[call.program.kernel].differentiated[0], _rows(call)
    if call.program.get("axis") == 0:
        return []
    own = ("kernel", "bias", "class_weight", "pos_weight", "teacher_kernel", "teacher_bias")
    return [n for n, a in call.arrays.items() if n == first or (n not in own and a.ndim and a.shape[0] == rows)]


def _one_row(call, i):
    arrays = dict(call.arrays)
    for name in _by_rows(call):
        arrays[name] = arrays[name][i : i + 1]
    if call.program.kernel == "linear_token_statistics":
        arrays["upstream"] = arrays["upstream"][:, i : i + 1]
    return Call(call.program, arrays)


def _zero_outside(call, start, end):
    arrays = dict(call.arrays)
    for name in _by_rows(call):
        arrays[name] = np.zeros_like(arrays[name])
        arrays[name][start:end] = call.arrays[name][start:end]
    return Call(call.program, arrays)
