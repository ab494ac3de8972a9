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
            with micro_batch(denominators, share), captured_gradients(model.optimizer, weights, share) as captured:
                logs = train_step(part)
            gradients = {id(variable): gradient for gradient, variable in captured}
            found = [gradients.get(id(weight)) for weight in weights]
            if sums is None:
                return logs, [None if g is None else _begun(w, g) for w, g in zip(weights, found, strict=True)]
            return logs, [None if g is None else _added(s, g) for s, g in zip(sums, found, strict=True)]

        in_turn = _unrolled if model.distribute_strategy.num_replicas_in_sync > 1 else _looped
        logs, sums = in_turn(run, data, steps)
        if weights:
            model.optimizer.apply(sums, weights)
        return logs

    return step


def _looped(run, data, steps):
    """The micro-batches in a loop, so that only one is in memory.

    The first, which may be smaller, stands before the loop: the sums begin with its gradients, so that no zeros are
    made, and no gradient is added, for it.
    """
    rows = _rows(data)
    size = _at_least_1((rows + steps - 1) // steps)
    after_first = _at_least_1((rows + size - 1) // size) - 1
    first = rows - after_first * size
    logs, sums = run(_map(lambda t: t[:first], data), _share(first, rows), None)
    if isinstance(after_first, int) and not after_first:
        return logs, sums
    parts = _map(lambda t: tf.reshape(t[first:], (after_first, size, *_sizes(t))), data)

    def body(i, logs, known):
        sums = iter(known)
        part = _map(lambda t: tf.gather(t, i), parts)
        logs, sums = run(part, _share(size, rows), [next(sums) if is_known else None for is_known in has_gradient])
        return i + 1, _tensors(logs), [one for one in sums if one is not None]

    has_gradient = [one is not None for one in sums]
    begin = (0, _tensors(logs), [one for one in sums if one is not None])
    _, logs, known = tf.while_loop(lambda i, *_: i < after_first, body, begin, parallel_iterations=1)
    sums = iter(known)
    return logs, [next(sums) if is_known else None for is_known in has_gradient]


def _unrolled(run, data, steps):
    """One micro-batch after the other, where replicas have to meet within each: inside of loops they cannot."""
    rows = _rows(data)
    size = _at_least_1((rows + steps - 1) // steps)
    ends = [tf.minimum(i * size, rows) for i in range(steps + 1)]
    # Of the rows of all replicas, some of which may have fewer than others, or none.
    sizes = tf.cast(tf.stack([end - first for first, end in itertools.pairwise(ends)]), "float32")
    sizes = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, sizes)
    shares = tf.unstack(sizes / tf.reduce_sum(sizes))
    sums: list[Any] | None = None
    for i, (first, end) in enumerate(itertools.pairwise(ends)):
        with tf.control_dependencies([one for one in sums or () if one is not None]):
            part = _map(lambda t, first=first, end=end: tf.identity(t[first:end]), data)
        logs, sums = run(part, shares[i], sums)
    return logs, sums


def _denominators(model, data, counting):
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    # What the model computes is not used, but for its mask: a graph leaves it out. Nothing is assigned.
    weights = [(weight, tf.convert_to_tensor(weight.value)) for weight in model.trainable_variables]
    with keras.StatelessScope(weights), counting() as found:
        # As in training: layers may add losses there only, each of which is counted in its turn.
        model.compute_loss(x=x, y=y, y_pred=model(x, training=True), sample_weight=sample_weight)
    return found


class _Capture:
    """Gradients of one training step that are kept in place of being applied, each times a share."""

    def __init__(self, share):
        self.share, self.is_scaled, self.found = share, False, []

    def take(self, gradients, variables):
        if self.found:
            raise NotImplementedError("A training step that calls its optimizer twice cannot be accumulated.")
        if self.share is not None and not self.is_scaled:
            gradients = [None if g is None else _times(g, self.share) for g in gradients]
        self.found.extend(zip(gradients, variables, strict=True))


class _Capturing:
    """The `apply` and `scale_loss` of an optimizer while gradients are captured.

    A share scales the loss, as a factor of loss scaling does: one number, where the gradients are as many as the
    weights. Replicas take turns, each in a thread of its own.
    """

    def __init__(self, optimizer, weights):
        self.weights, self.users = weights, 0
        self.originals = {name: getattr(optimizer, name) for name in ("apply", "scale_loss")}
        # What stood in their places on this object, such as that of a callback that watches the gradients.
        self.before = {name: replace_own(optimizer, name, getattr(self, name)) for name in self.originals}

    def apply(self, gradients, trainable_variables=None):
        capture = _capture.get()
        if capture is None:
            return self.originals["apply"](gradients, trainable_variables)
        return capture.take(gradients, self.weights if trainable_variables is None else trainable_variables)

    def scale_loss(self, loss):
        capture = _capture.get()
        if capture is not None and capture.share is not None:
            capture.is_scaled = True
            loss = loss * tf.cast(capture.share, loss.dtype)
        return self.originals["scale_loss"](loss)


_capture: contextvars.ContextVar[_Capture | None] = contextvars.ContextVar("_capture", default=None)


@contextlib.contextmanager
def captured_gradients(optimizer, weights, share=None):
    """Yields the gradients and variables that the optimizer is given, in place of applying them.

    With `share` they are those of the loss times this number.
    """
    user = getattr(optimizer.apply, "__self__", None)
    capturing = user if isinstance(user, _Capturing) else _Capturing(optimizer, weights)
    capturing.users += 1
    capture = _Capture(share)
    # A step may be judged of which the parts are captured too.
    token = _capture.set(capture)
    try:
        yield capture.found
    finally:
        _capture.reset(token)
        capturing.users -= 1
        if capturing.users == 0:
            for name, before in capturing.before.items():
                restore_own(optimizer, name, before)


def _times(gradient, share):
    if isinstance(gradient, tf.IndexedSlices):
        values = gradient.values * tf.cast(share, gradient.dtype)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return gradient * tf.cast(share, gradient.dtype)


def _begun(weight, gradient):
    return tf.cast(tf.convert_to_tensor(gradient), _accumulator_dtype(weight))


def _added(total, gradient):
    if isinstance(gradient, tf.IndexedSlices):
        return tf.tensor_scatter_nd_add(total, gradient.indices[:, None], tf.cast(gradient.values, total.dtype))
    return total + tf.cast(gradient, total.dtype)


def _accumulator_dtype(weight):
    return "float32" if weight.dtype in ("float16", "bfloat16") else weight.dtype


def _tensors(logs):
    return keras.tree.map_structure(tf.convert_to_tensor, logs)


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
