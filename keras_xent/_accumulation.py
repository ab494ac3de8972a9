"""Micro-batches of one batch: what its losses are divided by is counted before the first of them is computed.

The gradient of a batch is the sum of its micro-batches' gradients, each times its share of the rows. For that a loss
divides the sum over the micro-batch by the share of what it would divide that of the whole batch by. Means over rows,
such as a regularizer, then need nothing.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

from keras import ops

from keras_xent import arguments
from keras_xent._types import Tensor
from keras_xent.kernels import reduction as _reduction

_counted: contextvars.ContextVar[list | None] = contextvars.ContextVar("_counted", default=None)
_micro_batch: contextvars.ContextVar[Iterator | None] = contextvars.ContextVar("_micro_batch", default=None)
_share: contextvars.ContextVar[Any] = contextvars.ContextVar("_share", default=1.0)


@contextlib.contextmanager
def counting() -> Iterator[list]:
    """Inside, each call of a loss adds its denominator to the list, and computes nothing else."""
    found: list[Any] = []
    token = _counted.set(found)
    try:
        yield found
    finally:
        _counted.reset(token)


@contextlib.contextmanager
def micro_batch(denominators: list, share: Any) -> Iterator[None]:
    """Inside, the losses, in the order of the count, are those of a part of a batch with this share of its rows."""
    token, token_of_share = _micro_batch.set(iter([(one, share) for one in denominators])), _share.set(share)
    try:
        yield
    finally:
        _micro_batch.reset(token)
        _share.reset(token_of_share)


def share_of_rows() -> Any:
    """Returns the share of the batch's rows that the step computes its loss of: 1 but for a micro-batch."""
    return _share.get()


def is_counting() -> bool:
    """Returns whether the called loss only counts its denominator."""
    return _counted.get() is not None


def is_active() -> bool:
    """Whether the loss that is called counts, or is one of a micro-batch."""
    return is_counting() or _micro_batch.get() is not None


def steps_of_optimizer(optimizer: Any) -> int | None:
    """The `gradient_accumulation_steps` of an optimizer, or of one inside of it; None where it accumulates nothing."""
    own = getattr(optimizer, "gradient_accumulation_steps", None)
    # A `LossScaleOptimizer` has one inside, a `keras.optimizers.MultiOptimizer` several.
    inside = [getattr(optimizer, "inner_optimizer", None), *(getattr(optimizer, "optimizers", None) or ())]
    of_others = (steps_of_optimizer(one) for one in inside if one is not None)
    return own or next(filter(None, of_others), None)


def divisor(normalizer: float | None) -> Any:
    """Returns the divisor of this call of a loss: the normalizer, or for a micro-batch that of the whole batch."""
    calls = _micro_batch.get()
    denominator, share = next(calls, (None, None)) if calls is not None else (None, None)
    if share is None:
        # None of the losses that were counted: a metric, for instance.
        return normalizer
    return (normalizer or 1.0) * share if denominator is None else denominator * share


def reduce(losses: Tensor, *, reduction: str | None, normalizer: float | None = None, **weighting: Any) -> Tensor:
    """`kernels.reduction.reduce`, of a micro-batch by the denominator of the whole batch."""
    found = _counted.get()
    if found is None:
        return _reduction.reduce(losses, reduction=reduction, normalizer=divisor(normalizer), **weighting)
    if reduction in ("none", None):
        arguments.warn(
            "What your code makes of losses with reduction=None is not counted by `accumulate_gradients`: unless it is "
            "their mean over rows, the step is not that of the whole batch. Give the loss the reduction."
        )
        found.append(None)
        return ops.zeros_like(losses)
    # Sums, and what is divided by a number, need no count.
    is_fixed = normalizer is not None or reduction == "sum"
    found.append(None if is_fixed else _reduction.reduction_weights(losses, reduction=reduction, **weighting)[1])
    return ops.zeros((), losses.dtype)
