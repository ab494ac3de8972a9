"""A training step that computes its batch in micro-batches, on JAX."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import keras

from keras_xent._backend._attributes import replace_own, restore_own


def accumulating_step(model: Any, train_step: Callable, steps: int, counting: Callable, micro_batch: Callable) -> Any:
    """A `train_step(state, data)` that calls the model's own for each micro-batch, and its optimizer once.

    See the function of TensorFlow.
    """

    def step(state, data):
        weights, others, optimizer_variables, metrics = state
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        # What the model computes is not used, but for its mask: the compiler leaves it out.
        with counting() as denominators:
            # As in training: layers may add losses there only, each of which is counted in its turn.
            state_of_loss = weights, others, metrics, x, y, sample_weight
            model.compute_loss_and_updates(*state_of_loss, training=True, optimizer_variables=optimizer_variables)
        leaf = next(leaf for leaf in keras.tree.flatten(data) if leaf is not None)
        rows = leaf.shape[0]
        size = max(-(-rows // steps), 1)
        whole = rows // size

        def run(part, share, sums, others, metrics):
            found: list[Any] = []

            def capture(optimizer_variables, gradients, trainable_variables):
                if found:
                    raise NotImplementedError("A training step that calls its optimizer twice cannot be accumulated.")
                found.extend(gradients)
                return trainable_variables, optimizer_variables

            with micro_batch(denominators, share), applying(model.optimizer, capture):
                logs, state = train_step((weights, others, optimizer_variables, metrics), part)
            sums = [s + share * g.astype(s.dtype) for s, g in zip(sums, found, strict=True)]
            return logs, sums, state[1], state[3]

        # Each micro-batch takes rows from all over the batch: of a batch on several devices it is then on all of them.
        parts = _map(lambda t: t[: whole * size].reshape(size, whole, *t.shape[1:]), data)

        def body(carry, i):
            part = _map(lambda t: jax.lax.dynamic_index_in_dim(t, i, axis=1, keepdims=False), parts)
            logs, *carry = run(part, size / rows, *carry)
            return carry, logs

        sums = [jax.numpy.zeros(w.shape, jax.numpy.promote_types(w.dtype, "float32")) for w in weights]
        carry, logs = jax.lax.scan(body, [sums, others, metrics], jax.numpy.arange(whole))
        logs = keras.tree.map_structure(lambda values: values[-1], logs)
        if rows > whole * size:
            rest = _map(lambda t: t[whole * size :], data)
            logs, *carry = run(rest, (rows - whole * size) / rows, *carry)
        sums, others, metrics = carry
        weights, optimizer_variables = model.optimizer.stateless_apply(optimizer_variables, sums, weights)
        # Metrics that watch the gradient keep it when they are asked.
        logs, metrics = with_metrics(model, metrics, lambda: with_results(model, logs))
        return logs, (weights, others, optimizer_variables, metrics)

    return step


def with_metrics(model: Any, metrics: list, function: Callable) -> tuple[Any, list]:
    """`function()` with these values of the metrics' variables, and the values that it has left in them."""
    scope = keras.StatelessScope(state_mapping=list(zip(model.metrics_variables, metrics, strict=True)))
    with scope:
        result = function()
    return result, [scope.get_current_value(variable) for variable in model.metrics_variables]


def with_results(model: Any, logs: Any) -> Any:
    """The logs of a step, with what the metrics say now."""
    return {**logs, **model.get_metrics_result()} if isinstance(logs, dict) else logs


def _map(function, data):
    return keras.tree.map_structure(lambda t: None if t is None else function(jax.numpy.asarray(t)), data)


@contextlib.contextmanager
def applying(optimizer, function):
    """Gives an optimizer another `stateless_apply` for a while."""
    before = replace_own(optimizer, "stateless_apply", function)
    try:
        yield
    finally:
        restore_own(optimizer, "stateless_apply", before)
