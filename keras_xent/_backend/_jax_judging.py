"""A training step that is judged before its update is made, on JAX."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from keras_xent._backend._jax_accumulation import applying, with_metrics, with_results


def judged_step(model: Any, train_step: Callable, judge: Callable, own: Sequence[Any], skips: bool) -> Any:
    """A `train_step(state, data)` that calls the model's own and then `judge`, and may return the state before it.

    See the function of TensorFlow.
    """
    kept = {id(variable) for variable in own}

    def watched(state, data):
        logs, (*others, metrics) = train_step(state, data)
        return logs, (*others, with_metrics(model, metrics, lambda: judge([]))[1])

    def step(state, data):
        found: list[list[Any]] = []
        apply = model.optimizer.stateless_apply

        def capture(optimizer_variables, gradients, trainable_variables):
            if found:
                raise NotImplementedError("A training step that calls its optimizer twice cannot be skipped.")
            found.append(list(gradients))
            if hasattr(apply, "watch"):
                apply.watch(optimizer_variables, gradients)
            return trainable_variables, optimizer_variables

        with applying(model.optimizer, capture):
            logs, after = train_step(state, data)
        weights, others, slots, metrics = after
        gradients = found[0] if found else []
        skip, metrics = with_metrics(model, metrics, lambda: judge([g for g in gradients if g is not None]))
        if found:
            update = getattr(apply, "unwatched", apply)
            weights, slots = jax.lax.cond(
                skip,
                lambda: (list(weights), list(slots)),
                lambda: tuple(map(list, update(slots, gradients, weights))),
            )

        def chosen(old, new):
            # What no layer has assigned is the very same, and needs no choice.
            return new if new is old else jax.numpy.where(skip, old, new)

        others = [chosen(*pair) for pair in zip(state[1], others, strict=True)]
        metrics = [
            new if id(variable) in kept else chosen(old, new)
            for variable, old, new in zip(model.metrics_variables, state[3], metrics, strict=True)
        ]
        logs, _ = with_metrics(model, metrics, lambda: with_results(model, logs))
        return logs, (weights, others, slots, metrics)

    return step if skips else watched
