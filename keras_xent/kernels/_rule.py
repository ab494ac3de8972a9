"""The interface of the functions that a linear kernel computes from the logits of its tokens."""

import abc
from typing import Any, TypeAlias

from keras import ops

from keras_xent._backend import uses_xla_cpu
from keras_xent._types import Tensor
from keras_xent.kernels._exponentials import LogitGradient, add_dependency
from keras_xent.kernels._xla_cpu import map_row_blocks

# Columns `[n, 1]`, and the gradient for the logits; None where there is no upstream gradient.
ColumnsAndGradient: TypeAlias = tuple[tuple[Tensor, ...], LogitGradient | None]


class Rule(abc.ABC):
    """Turns logits `[n, V]` into columns `[n, 1]`, and the gradient of these into that of the logits.

    Subclasses are frozen dataclasses: a rule is a part of the compiled program, and the key of it.
    """

    # How many columns there are, and how many of them, the first ones, have a gradient: the values.
    num_columns: int
    num_values = 1
    # How many arrays of the size of the logits exist at once.
    num_logits = 1
    # How many of the arrays that a rule needs have a row for each token; all tokens share the others, the constants.
    num_rows = 1
    # Whether blocks of rows should be large, as for many operations.
    has_large_blocks = False
    # Whether rows stay in the order of the tokens, and are gathered for one chunk after the other: for those that take
    # as much memory as the logits.
    leaves_rows = False

    @abc.abstractmethod
    def forward(self, logits: Tensor, arrays: Any, constants: Any) -> tuple[tuple[Tensor, ...], Any]:
        """The columns, and what `backward` needs of them."""

    @abc.abstractmethod
    def backward(self, upstream: Tensor, residuals: Any, logits: Tensor, arrays: Any, constants: Any) -> Tensor:
        """The gradient for the logits of `sum(upstream * values)`; `upstream` has a column for each value."""

    def of_chunk(self, upstream: Tensor, logits: Tensor, arrays: Any, constants: Any) -> ColumnsAndGradient:
        """The columns, and the gradient for the logits, in their memory; None without `upstream`."""
        found = self.row_scaled(upstream, logits, arrays, constants) if uses_xla_cpu() else None
        if found is not None:
            return found
        has_upstream = upstream is not None
        arrays = (*arrays, *self.row_maxima(logits, arrays))

        def on_block(logits, *arrays):
            upstream, arrays = (arrays[0], arrays[1:]) if has_upstream else (None, arrays)
            columns, residuals = self.forward(logits, arrays, constants)
            if not has_upstream:
                return columns
            # The gradient takes the memory of the logits. XLA:CPU would copy them for a reader that it does not wait
            # for.
            upstream = add_dependency(upstream, *columns)
            return self.backward(upstream, residuals, logits, arrays, constants), *columns

        arrays = (logits, upstream, *arrays) if has_upstream else (logits, *arrays)
        if uses_xla_cpu():
            columns = (ops.zeros_like(logits[:, :1]),) * (self.num_columns + has_upstream)
            results = map_row_blocks(on_block, arrays, columns, in_place=has_upstream, is_large=self.has_large_blocks)
        else:
            results = on_block(*arrays)
        return (tuple(results[1:]), LogitGradient(results[0])) if has_upstream else (tuple(results), None)

    def row_scaled(self, upstream: Tensor, logits: Tensor, arrays: Any, constants: Any) -> ColumnsAndGradient | None:
        """The columns, and the gradient with factors of its rows; None for rules that have none.

        On a CPU this takes the place of `forward` and `backward`, with `upstream` None for the columns alone.
        Rows without an upstream gradient have factors of 0.
        """
        return None

    def prepare(self, rows: Any, constants: Any) -> tuple[Any, Any]:
        """Rows and constants, as the loop should see them."""
        return rows, constants

    def arrays(self, rows: Any, constants: Any) -> tuple[Tensor, ...]:
        """The arrays that `forward` takes, from the rows of one chunk."""
        return tuple(rows)

    def row_maxima(self, logits: Tensor, arrays: Any) -> tuple[Tensor, ...]:
        """Maxima `[n, 1]` that `forward` and `backward` get after the arrays.

        On a CPU these are of a whole chunk: there XLA is fast at maxima of what is in memory, as blocks are not.
        """
        return ()

    def values_only(self) -> "Rule":
        """The rule without the columns that have no gradient."""
        return self
