"""What a loss has found out about each token, left where the metrics of the same step find it.

TensorFlow hands the same predictions to the loss and to the metrics: there it is left on them. On JAX the loss runs
inside a gradient and the metrics outside, so that only the variables of the metrics come from the one to the other:
there the loss gives it to the metrics themselves, which use it if it is of the labels that they are updated with.
"""

import weakref
from typing import Any, NamedTuple, Protocol

import keras
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


_takers: weakref.WeakSet = weakref.WeakSet()


def register(taker: Taker) -> None:
    """Makes a metric known to the losses for as long as it lives."""
    _takers.add(taker)


def ranks_are_wanted() -> bool:
    """Whether a living metric needs the ranks of the labels, which cost a pass over the logits."""
    return any(taker.needs_ranks for taker in _takers)


def leave(left: Left) -> None:
    """Leaves statistics for the metrics."""
    if keras.backend.backend() == "tensorflow":
        # There the metrics see a Keras mask by themselves.
        if left.statistics is not None:
            set_tensor_attr(left.y_pred, "_keras_xent_statistics", left._replace(y_pred=None))
    elif keras.src.backend.common.stateless_scope.in_stateless_scope():
        for taker in list(_takers):
            taker.take(left)


def find(y_pred: Any) -> Left | None:
    """The statistics that a loss left on these predictions, or None."""
    return get_tensor_attr(y_pred, "_keras_xent_statistics")
