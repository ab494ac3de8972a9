"""Functions within programs of XLA, traced by TensorFlow once for many numbers of rows.

With a new number of rows a program is traced and compiled again. Tracing takes Python 0.1 ms for each operation, half
as long as compiling in all; a call of a function that has been traced takes 2 ms with its gradient, and XLA compiles
what is inside for the number of rows that there are.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_xent._backend._buckets import example_rows
from keras_xent._backend._tensorflow_graph import has_tangents, in_branch_of_xla, in_xla
from keras_xent._backend._xla import uses_xla
from keras_xent._types import Tensor

# Of larger arrays a program is made of blocks, whose number is a part of the trace, and takes longer to run.
_MOST_NUMBERS = 2**17


def is_traced_once(inputs: Sequence[Tensor]) -> bool:
    """Whether a function of these, the first of which has rows, is to be traced for other numbers of rows too."""
    first = inputs[0]
    if not uses_xla() or not tf.is_symbolic_tensor(first) or any(one is None or None in one.shape for one in inputs):
        return False
    # Operations of a trace are for the device that it was made on, and replicas have one each.
    is_small = 0 < math.prod(first.shape) < _MOST_NUMBERS and not tf.distribute.has_strategy()
    return is_small and in_xla() and not in_branch_of_xla() and not has_tangents(*inputs)


def call_traced(program: Callable, inputs: Sequence[Tensor], options: dict[str, Any]) -> Any:
    """`program(*inputs, **options)`, whose results have as many rows as the first of the inputs."""
    rows = inputs[0].shape[0]
    # Arrays of one row are broadcast. Of one row alone, the trace is for it.
    specs = tuple((one.dtype, None if one.shape[0] == rows > 1 else one.shape[0], *one.shape[1:]) for one in inputs)
    # What a program is made of changes at sizes that are powers of 2.
    key = program, specs, math.prod(inputs[0].shape).bit_length(), tuple(sorted(options.items()))
    if key not in _functions:
        _functions[key] = _trace(program, specs, options, rows)
    results = _functions[key](*inputs)
    for result in tf.nest.flatten(results):
        result.set_shape((rows, *result.shape[1:]))
    return results


_functions: dict[tuple, Callable] = {}


def _trace(program, specs, options, rows):
    token = example_rows.set(rows)
    try:
        traced = tf.function(lambda *inputs: program(*inputs, **options), autograph=False)
        return traced.get_concrete_function(*(tf.TensorSpec(shape, dtype) for dtype, *shape in specs))
    finally:
        example_rows.reset(token)


def clear_traces() -> None:
    """Frees the functions."""
    _functions.clear()
