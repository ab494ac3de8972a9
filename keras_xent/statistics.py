"""What a loss has found out about each token, left where the metrics of the same step find it.

TensorFlow hands the same predictions to the loss and to the metrics: there it is left on them. On JAX the loss runs
inside a gradient and the metrics outside, so that only the variables of the metrics come from the one to the other:
there the loss gives it to the metrics themselves, which use it if it is of the labels that they are updated with.
"""

import weakref
from typing import Any, NamedTuple, Protocol

import keras
from keras.src.backend.common.stateless_scope import get_stateless_scope
from keras.src.backend.common.tensor_attributes import get_tensor_attr, set_tensor_attr

from keras_xent.kernels.linear import Statistics


class Left(NamedTuple):
    """Statistics, and what they were made with. None where the loss has not found out that much."""

    statistics: Statistics | None
    y_true: Any
    y_pred: Any
    sample_weight: Any
    ignore_class: Any
    logit_softcap: float | None


class Taker(Protocol):
    """A metric that can use statistics."""

    needs_ranks: bool

    def take(self, left: Left) -> None:
        """Called while the loss is computed, inside the same scope of variables as the metric's."""

    def is_updated_in(self, scope: Any) -> bool:
        """Whether the variables of the metric are in a scope."""


_takers: weakref.WeakSet = weakref.WeakSet()


def register(taker: Taker) -> None:
    """Makes a metric known to the losses for as long as it lives."""
    _takers.add(taker)


def ranks_are_wanted() -> bool:
    """Whether a metric needs the ranks of the labels, which cost a pass over the logits.

    On JAX a metric of this very step. TensorFlow does not tell which these are: there any that is alive.
    """
    return any(taker.needs_ranks for taker in _of_this_step())


def leave(left: Left) -> None:
    """Leaves statistics for the metrics."""
    if keras.backend.backend() == "tensorflow":
        # There the metrics see a Keras mask by themselves.
        if left.statistics is not None:
            set_tensor_attr(left.y_pred, "_keras_xent_statistics", left._replace(y_pred=None))
    else:
        for taker in _of_this_step():
            taker.take(left)


def _of_this_step():
    if keras.backend.backend() == "tensorflow":
        return list(_takers)
    scope = get_stateless_scope()
    return [] if scope is None else [taker for taker in list(_takers) if taker.is_updated_in(scope)]


def find(y_pred: Any) -> Left | None:
    """The statistics that a loss left on these predictions, or None."""
    return get_tensor_attr(y_pred, "_keras_xent_statistics")
