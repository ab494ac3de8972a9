"""Metrics that hold numbers of a training step for a callback, and that Keras neither logs nor saves."""

from typing import Any

import keras

from keras_xent import _backend, _keras


class UnloggedMetric(keras.metrics.Metric):
    """Base of what keeps numbers of a step: on JAX one can leave them in variables of the model or its metrics only."""

    # Tells the readers of metrics that Keras' logs have no entry of it.
    is_in_logs = False

    def attach(self, model: Any, name: str) -> None:
        """Makes this an attribute of a model: its variables are then part of the state of the training step."""
        _keras.set_metric(model, name, self)
        if _backend.NAME == "jax" and not any(one is self for one in model.metrics):
            raise ValueError(
                f"The property `metrics` of {type(model).__name__} must return `super().metrics` too: on JAX numbers "
                "of a step leave it in variables of these only."
            )

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
