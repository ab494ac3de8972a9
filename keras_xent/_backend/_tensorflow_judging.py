"""A training step that is judged before its update is made, on TensorFlow."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_xent._backend._tensorflow_accumulation import captured_gradients


def judged_step(model: Any, train_step: Callable, judge: Callable, own: Sequence[Any], skips: bool) -> Any:
    """A `train_step(data)` that calls the model's own and then `judge`, and may leave out all that it has changed.

    Args:
        model: a compiled Keras model.
        train_step: its training step.
        judge: a function of the gradients, empty without `skips`, that returns whether the step is to be left out.
        own: the variables that `judge` keeps, which are changed in any case.
        skips: whether a step can be left out.
    """

    def watched(data):
        logs = train_step(data)
        judge([])
        return logs

    def step(data):
        others = _others(model, own)
        # No copies: a variable that is assigned while its value is held gets memory of its own.
        before = [tf.convert_to_tensor(variable.value) for variable in others]
        with captured_gradients(model.optimizer, model.trainable_weights) as captured:
            logs = train_step(data)
        gradients, variables = [g for g, _ in captured], [v for _, v in captured]
        optimizer = model.optimizer
        if gradients and not optimizer.built:
            # A branch of a condition cannot make variables.
            optimizer.build(variables)
        if hasattr(optimizer.apply, "watch"):
            optimizer.apply.watch(gradients)
        apply = getattr(optimizer.apply, "unwatched", optimizer.apply)

        def leave_out():
            for variable, value in zip(others, before, strict=True):
                variable.assign(value)
            return 0

        def update():
            if gradients:
                apply(gradients, variables)
            return 0

        tf.cond(judge([getattr(g, "values", g) for g in gradients if g is not None]), leave_out, update)
        return {**logs, **model.get_metrics_result()} if isinstance(logs, dict) else logs

    return step if skips else watched


def _others(model, own):
    """What a step changes beside the weights: moving averages, seeds and metrics."""
    kept = {id(variable) for variable in own}
    found = {id(variable): variable for variable in (*model.non_trainable_variables, *model.metrics_variables)}
    return [variable for key, variable in found.items() if key not in kept]
