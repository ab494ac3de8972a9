"""Metrics that hold numbers of a training step for a callback, and that Keras neither logs nor saves."""

from typing import Any

import keras


class UnloggedMetric(keras.metrics.Metric):
    """Base of what keeps numbers of a step: on JAX one can leave them in variables of the model or its metrics only."""

    # Tells the readers of metrics that Keras' logs have no entry of it.
    is_in_logs = False

    def update_state(self, *arguments: Any, **named: Any) -> None:
        """Does nothing: not the labels and predictions are watched, but what the step computes of them."""

    def result(self) -> dict[str, Any]:
        """No entries for the logs."""
        return {}

    def reset_state(self) -> None:
        """Keeps the numbers of the last step."""

    def save_own_variables(self, store: Any) -> None:
        """Saves nothing: a model is saved as if it were not watched."""

    def load_own_variables(self, store: Any) -> None:
        """Loads nothing."""


def is_replicated(model: Any) -> bool:
    """Returns whether a model is trained in several replicas (`tf.distribute`), each with a step of its own."""
    return getattr(getattr(model, "distribute_strategy", None), "num_replicas_in_sync", 1) > 1
