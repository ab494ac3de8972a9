"""Compiled kernels: functions of tensors and options that XLA compiles once for each set of shapes."""

import functools
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_xent import _backend
from keras_xent._backend import uses_xla, uses_xla_cpu
from keras_xent._types import Tensor
from keras_xent.kernels._dtypes import accumulator_dtype, narrow_float
from keras_xent.kernels._xla_cpu import bits_of, from_bits, map_row_blocks

_when_cleared: list[Callable[[], None]] = []


class CompiledKernel:
    """A pure function, compiled by XLA: its positional arguments are tensors, its keyword arguments options.

    Options are Python values that are part of the compiled program, and have to be hashable.
    """

    def __init__(self, function: Callable) -> None:
        self._function = function
        self._program = functools.cache(self._compile)
        on_clear_cache(self.clear_cache)

    def __call__(self, *tensors: Tensor, **options: Any) -> Any:
        """Runs the program."""
        program, arguments = self.lower(*tensors, **options)
        return program(*arguments)

    def lower(self, *tensors: Tensor, **options: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """The program for these arguments, a function of the backend, and the arguments that it takes."""
        # No program inside a program: it would be traced apart, and in a branch TensorFlow 2.21 aborts the process.
        is_program = uses_xla() and not _backend.in_xla()
        # TensorFlow would take a program made for any number of classes for known ones too (2.21): it is another one,
        # and sums its rows less exactly.
        return self._program(tuple(sorted(options.items())), is_program, _knows_row_sizes(tensors)), tensors

    @property
    def unblocked(self) -> Callable:
        """The same function without loops of unknown length, which have no derivative in XLA."""
        return self

    def clear_cache(self) -> None:
        """Frees the compiled programs."""
        self._program.cache_clear()

    def _compile(self, options, with_xla, _knows_row_sizes):
        def run(*tensors):
            return self._function(*tensors, **dict(options))

        return _backend.jit(run) if with_xla else run


def _knows_row_sizes(tensors):
    """Whether all axes but the first are known, of tensors and tuples of them."""
    return all(
        _knows_row_sizes(one) if isinstance(one, tuple) else one is None or None not in tuple(one.shape)[1:]
        for one in tensors
    )


class RowKernel(CompiledKernel):
    """A compiled function of rows that writes nothing of the size of its input to memory on a CPU.

    The function takes `[rows, classes, ...]` and arrays with as many rows, or with one that is broadcast. It returns
    `(value, residuals)`, `num_outputs` arrays in all with one column each. Where `is_blocked(rows, **options)`, a CPU
    runs it on one block of rows after the other.
    """

    def __init__(self, function: Callable, *, num_outputs: int, is_blocked: Callable[..., bool]) -> None:
        super().__init__(self._by_blocks)
        self._of_rows, self._num_outputs, self._is_blocked = function, num_outputs, is_blocked
        self._unblocked = CompiledKernel(function)

    def lower(self, *tensors: Tensor, **options: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """The program for these arguments, and the arguments that it takes: 16-bit floats as bits."""
        if not (self._is_blocked(tensors[0], **options) and uses_xla_cpu()):
            return super().lower(*tensors, formats=None, **options)
        formats = tuple(map(narrow_float, tensors))
        return super().lower(*map(bits_of, tensors, formats), formats=formats, **options)

    @property
    def unblocked(self) -> Callable:
        """The same function without loops of unknown length, which have no derivative in XLA."""
        return self._unblocked

    def _by_blocks(self, *arrays, formats, **options):
        if formats is None:
            return self._of_rows(*arrays, **options)

        def on_block(*blocks):
            value, residuals = self._of_rows(*map(from_bits, blocks, formats), **options)
            return value, *residuals

        rows = arrays[0]
        column = ops.zeros((ops.shape(rows)[0], 1, *ops.shape(rows)[2:]), accumulator_dtype(rows))
        value, *residuals = map_row_blocks(on_block, arrays, (column,) * self._num_outputs)
        return value, tuple(residuals)


def row_kernel(*, num_outputs: int, is_blocked: Callable[..., bool]) -> Callable[[Callable], RowKernel]:
    """Decorator: a `RowKernel` of the function."""
    return lambda function: RowKernel(function, num_outputs=num_outputs, is_blocked=is_blocked)


def on_clear_cache(clear: Callable[[], None]) -> None:
    """Has `clear_cache` call this function too."""
    _when_cleared.append(clear)


def clear_cache() -> None:
    """Frees all compiled programs, for processes that have called kernels with very many shapes and options."""
    for clear in _when_cleared:
        clear()
    _backend.clear_programs()
