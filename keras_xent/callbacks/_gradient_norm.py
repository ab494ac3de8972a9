"""The norm of the gradient of a training step, left where it can be read after the step."""

import weakref
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_xent import _backend
from keras_xent._keras import training_state
from keras_xent.callbacks._unlogged_metric import UnloggedMetric, is_replicated


class GradientNorm(UnloggedMetric):
    """Euclidean norm of the gradient of the last step, over all trainable weights, before any clipping.

    Keras shows the gradient to the optimizer only, which this watches.
    """

    def __init__(self) -> None:
        super().__init__(name="gradient_norm")
        self._norm = self.add_variable((), initializer="zeros", dtype="float32", name="norm")
        self._of_this_step: Any = None
        self._optimizer: Callable[[], Any] = lambda: None

    @classmethod
    def watching(cls, model: Any) -> "GradientNorm":
        """The norm for the optimizer of a compiled model, of its steps from the next call of `fit` on."""
        if is_replicated(model):
            raise ValueError(
                "`gradient_norm` must be False under tf.distribute, where each replica has a gradient of its own. "
                "Received: gradient_norm=True."
            )
        if getattr(model, "optimizer", None) is None:
            raise ValueError(
                "`gradient_norm` must be False for a model that is compiled without an optimizer. "
                "Received: gradient_norm=True."
            )
        norm = getattr(model, "_keras_xent_gradient_norm", None)
        if norm is None or norm._optimizer() is not model.optimizer:
            norm = cls()
            norm.attach(model, "_keras_xent_gradient_norm")
            norm._watch(model.optimizer)
            model.train_function = None
        return norm

    def _watch(self, optimizer):
        # Keras would save an attribute, and load it into what is not watched.
        self._optimizer = weakref.ref(optimizer)
        if _backend.NAME == "jax":
            self._watch_stateless(optimizer)
            return
        apply = optimizer.apply

        def take(gradients):
            scale = getattr(optimizer, "dynamic_scale", None) if optimizer.built else None
            self._norm.assign(_norm_of(gradients, optimizer.loss_scale_factor if scale is None else scale))

        def watched(gradients, trainable_variables=None):
            gradients = list(gradients)
            take(gradients)
            return apply(gradients, trainable_variables)

        # For who calls the optimizer in a branch, out of which a number would not come.
        watched.watch, watched.unwatched = take, apply  # type: ignore[attr-defined]
        optimizer.apply = watched

    def _watch_stateless(self, optimizer):
        apply = optimizer.stateless_apply

        def take(optimizer_variables, gradients):
            scale = getattr(optimizer, "dynamic_scale", None)
            if scale is not None:
                scale = optimizer_variables[[v is scale for v in optimizer.variables].index(True)]
            self._of_this_step = _norm_of(gradients, optimizer.loss_scale_factor if scale is None else scale)

        def watched(optimizer_variables, gradients, trainable_variables):
            take(optimizer_variables, gradients)
            return apply(optimizer_variables, gradients, trainable_variables)

        watched.watch, watched.unwatched = take, apply  # type: ignore[attr-defined]
        optimizer.stateless_apply = watched

    def result(self) -> dict[str, Any]:
        """No entries for the logs. On JAX the norm is kept here, which is asked for after the optimizer."""
        if self._of_this_step is not None:
            self._norm.assign(self._of_this_step)
            self._of_this_step = None
        return {}

    def value(self, model: Any) -> float:
        """The norm, for the model that is watched. Waits for the device."""
        with training_state(model):
            return float(ops.convert_to_numpy(self._norm))


def _norm_of(gradients, scale):
    gradients = [_whole(g) for g in gradients if g is not None]
    norm = ops.sqrt(sum(ops.sum(ops.square(ops.cast(g, "float32"))) for g in gradients))
    return norm if scale is None else norm / scale


def _whole(gradient):
    """TensorFlow gives the gradient of an embedding as rows, of which some may be of the same token."""
    if not hasattr(gradient, "indices"):
        return gradient
    import tensorflow as tf

    return tf.convert_to_tensor(gradient)
