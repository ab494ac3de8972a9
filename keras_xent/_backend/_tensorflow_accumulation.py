"""A training step that computes its batch in micro-batches, on TensorFlow."""

import contextlib
import contextvars
import itertools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_xent._backend._attributes import replace_own, restore_own


def accumulating_step(model: Any, train_step: Callable, steps: int, counting: Callable, micro_batch: Callable) -> Any:
    """A `train_step(data)` that calls the model's own for each micro-batch, and its optimizer once.

    Args:
        model: a compiled Keras model.
        train_step: its training step.
        steps: how many micro-batches a batch is cut into, at most.
        counting: a context in which the losses return what they would divide by, and that yields these.
        micro_batch: a context in which the losses divide by these, given the micro-batch's share of the rows.
    """

    def step(data):
        denominators = _denominators(model, data, counting)
        weights = model.trainable_weights

        def run(part, share, sums):
            with micro_batch(denominators, share), captured_gradients(model.optimizer, weights) as captured:
                logs = train_step(part)
            gradients = {id(variable): gradient for gradient, variable in captured}
            found = [gradients.get(id(weight)) for weight in weights]
            added = [s if g is None else _added(s, g, share) for s, g in zip(sums, found, strict=True)]
            return logs, added, [g is not None for g in found]

        sums = [tf.zeros(weight.shape, _accumulator_dtype(weight)) for weight in weights]
        in_turn = _unrolled if model.distribute_strategy.num_replicas_in_sync > 1 else _looped
        logs, sums, known = in_turn(run, data, steps, sums)
        if weights:
            gradients = [one if is_known else None for one, is_known in zip(sums, known, strict=True)]
            model.optimizer.apply(gradients, weights)
        return logs

    return step


def _looped(run, data, steps, sums):
    """The micro-batches in a loop, so that only one is in memory; the last one may be smaller."""
    rows = _rows(data)
    size = _at_least_1((rows + steps - 1) // steps)
    before_last = _at_least_1((rows + size - 1) // size) - 1
    parts = _map(lambda t: tf.reshape(t[: before_last * size], (before_last, size, *_sizes(t))), data)

    def body(i, sums):
        _, sums, _ = run(_map(lambda t: tf.gather(t, i), parts), _share(size, rows), sums)
        return i + 1, sums

    _, sums = tf.while_loop(lambda i, _: i < before_last, body, (0, sums), parallel_iterations=1)
    last = _map(lambda t: t[before_last * size :], data)
    return run(last, _share(rows - before_last * size, rows), sums)


def _unrolled(run, data, steps, sums):
    """One micro-batch after the other, where replicas have to meet within each: inside of loops they cannot."""
    rows = _rows(data)
    size = _at_least_1((rows + steps - 1) // steps)
    ends = [tf.minimum(i * size, rows) for i in range(steps + 1)]
    # Of the rows of all replicas, some of which may have fewer than others, or none.
    sizes = tf.cast(tf.stack([end - first for first, end in itertools.pairwise(ends)]), "float32")
    sizes = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, sizes)
    shares = tf.unstack(sizes / tf.reduce_sum(sizes))
    for i, (first, end) in enumerate(itertools.pairwise(ends)):
        with tf.control_dependencies(sums if i else []):
            part = _map(lambda t, first=first, end=end: tf.identity(t[first:end]), data)
        logs, sums, known = run(part, shares[i], sums)
    return logs, sums, known


def _denominators(model, data, counting):
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    # What the model computes is not used, but for its mask: a graph leaves it out. Nothing is assigned.
    weights = [(weight, tf.convert_to_tensor(weight.value)) for weight in model.trainable_variables]
    with keras.StatelessScope(weights), counting() as found:
        model.compute_loss(x=x, y=y, y_pred=model(x), sample_weight=sample_weight)
    return found


class _Apply:
    """The `apply` of an optimizer while gradients are captured. Replicas take turns, each in a thread of its own."""

    def __init__(self, optimizer, weights):
        self.weights, self.original, self.users = weights, optimizer.apply, 0
        # What stood in its place on this object, such as that of a callback that watches the gradients.
        self.before = None

    def __call__(self, gradients, trainable_variables=None):
        found = _gradients.get()
        if found is None:
            return self.original(gradients, trainable_variables)
        if found:
            raise NotImplementedError("A training step that calls its optimizer twice cannot be accumulated.")
        variables = self.weights if trainable_variables is None else trainable_variables
        found.extend(zip(gradients, variables, strict=True))


_gradients: contextvars.ContextVar[list[tuple[Any, Any]] | None] = contextvars.ContextVar("_gradients", default=None)


@contextlib.contextmanager
def captured_gradients(optimizer, weights):
    """Yields the gradients and variables that the optimizer is given, in place of applying them."""
    apply = optimizer.apply if isinstance(optimizer.apply, _Apply) else _Apply(optimizer, weights)
    if apply.users == 0:
        apply.before = replace_own(optimizer, "apply", apply)
    apply.users += 1
    found: list[tuple[Any, Any]] = []
    token = _gradients.set(found)
    try:
        yield found
    finally:
        _gradients.reset(token)
        apply.users -= 1
        if apply.users == 0:
            restore_own(optimizer, "apply", apply.before)


def _added(total, gradient, share):
    if isinstance(gradient, tf.IndexedSlices):
        values = tf.cast(gradient.values, total.dtype) * tf.cast(share, total.dtype)
        return tf.tensor_scatter_nd_add(total, gradient.indices[:, None], values)
    return total + tf.cast(gradient, total.dtype) * tf.cast(share, total.dtype)


def _accumulator_dtype(weight):
    return "float32" if weight.dtype in ("float16", "bfloat16") else weight.dtype


def _map(function, data):
    return keras.tree.map_structure(lambda t: None if t is None else function(t), data)


def _rows(data):
    leaf = next(leaf for leaf in keras.tree.flatten(data) if leaf is not None)
    return tf.shape(leaf)[0] if leaf.shape[0] is None else leaf.shape[0]


def _sizes(tensor):
    return [tf.shape(tensor)[i] if size is None else size for i, size in enumerate(tensor.shape) if i]


def _at_least_1(number):
    return max(number, 1) if isinstance(number, int) else tf.maximum(number, 1)


def _share(part, rows):
    if isinstance(part, int) and isinstance(rows, int):
        return part / rows
    return tf.cast(part, "float32") / tf.cast(rows, "float32")
