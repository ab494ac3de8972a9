"""Sums of the tokens of each of several groups."""

from collections.abc import Callable, Sequence

from keras import ops

from keras_xent import _backend, _keras
from keras_xent._types import Tensor
from keras_xent.kernels._shapes import align_weights


class Groups:
    """Names of groups, and where the group of each example or token is found."""

    def __init__(self, names: Sequence[str] | None, group_of: Callable | str | None) -> None:
        valid = names is None or (isinstance(names, Sequence) and not isinstance(names, str))
        if not valid or (names is not None and (not names or len(set(names)) != len(names))):
            raise ValueError(f"`groups` must be None or a list of different names. Received: groups={names!r}.")
        self.names = None if names is None else [str(name) for name in names]
        if (names is None) != (group_of is None) or not (group_of is None or isinstance(group_of, str | Callable)):
            raise ValueError(
                "`groups` and `group_of` must be given together, `group_of` as a function of the labels or the name of "
                f"an entry of `x`. Received: groups={names!r} and group_of={group_of!r}."
            )
        self.group_of = group_of

    def __len__(self) -> int:
        return len(self.names or ())

    def sums(self, values: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
        """`[2 G]` float32: the weighted sum of the values of each group's tokens, and the sum of their weights."""
        ids = ops.cast(align_weights(self._ids(labels), weights.shape, "group_of"), "int32")
        ids = ops.broadcast_to(ids, ops.shape(weights))
        ids, values, weights = (ops.reshape(one, (1, -1)) for one in (ids, values, weights))
        is_in_group = ops.equal(ids, ops.arange(len(self), dtype="int32")[:, None])  # [G, N]
        rows = ops.concatenate([ops.where(is_in_group, one, 0.0) for one in (values * weights, weights)])  # [2 G, N]
        return _row_sums(rows)

    def _ids(self, labels):
        if callable(self.group_of):
            return self.group_of(labels)
        if _keras.is_building():
            return ops.zeros_like(labels)
        x = _keras.inputs_of_step()
        if not isinstance(x, dict) or self.group_of not in x:
            raise ValueError(
                "`group_of` must name an entry of `x`, a dict, in `fit`, `evaluate` and a model's own `train_step`. "
                f"Received: group_of={self.group_of!r}, and "
                f"{f'x with {sorted(x)}' if isinstance(x, dict) else f'x={x!r}'}. "
                "In a loop of your own, give `group_of` as a function of the labels."
            )
        return x[self.group_of]


def _row_sums(rows):
    """The sums of `[R, N]` over `N`, whose rounding does not grow with it."""
    size = rows.shape[1]
    if size is None:
        return ops.cast(ops.sum(ops.cast(rows, "float64"), axis=1), rows.dtype)
    if _backend.batch_mesh(rows) is not None or _backend.is_partitioned(rows):
        return ops.sum(rows, axis=1)
    # Halves are added first.
    lanes = 64
    rows = ops.reshape(ops.pad(rows, ((0, 0), (0, -size % lanes))), (rows.shape[0], lanes, -1))
    while lanes > 1:
        lanes //= 2
        rows = rows[:, :lanes] + rows[:, lanes:]
    return ops.sum(rows, axis=(1, 2))
