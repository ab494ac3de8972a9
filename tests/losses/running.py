"""A loss and its gradient, in every mode of the backend."""

import numpy as np
from keras import ops

from tests.backend import BACKEND, MODES, to_numpy
from tests.internals import set_keras_mask

if BACKEND == "tensorflow":
    import tensorflow as tf
else:
    import jax


def run(loss, y_true, y_pred, sample_weight=None, mask=None, *, mode="eager"):
    """The loss, and the gradient of its sum for `y_pred`.

    All arrays are arguments of the traced function, as in a training step. The mask is left on `y_pred`, as layers do.
    """

    def forward(y_true, y_pred, sample_weight, mask):
        if mask is not None:
            set_keras_mask(y_pred, mask)
        return loss(y_true, y_pred, sample_weight)

    if BACKEND == "tensorflow":

        def step(y_true, y_pred, sample_weight, mask):
            with tf.GradientTape() as tape:
                tape.watch(y_pred)
                value = forward(y_true, y_pred, sample_weight, mask)
            return value, tape.gradient(value, y_pred)
    else:

        def step(y_true, y_pred, sample_weight, mask):
            value, pull = jax.vjp(lambda p: forward(y_true, p, sample_weight, mask), y_pred)
            return value, pull(ops.ones_like(value))[0]

    # A copy: a mask left on the caller's own tensor would meet the next loss.
    y_pred = ops.copy(ops.convert_to_tensor(y_pred))
    value, gradient = MODES[mode](step)(y_true, y_pred, sample_weight, mask)
    return to_numpy(value), to_numpy(gradient)


def value(loss, y_true, y_pred, sample_weight=None, mask=None, *, mode="eager"):
    """The loss alone."""
    return run(loss, y_true, y_pred, sample_weight, mask, mode=mode)[0]


def assert_close(actual, expected, rtol=2e-6, scale=None, case=""):
    """Within `rtol` of each number, or of `scale` times the largest of them (for gradients: 1e-6)."""
    expected = np.asarray(expected, np.float64)
    atol = 0.0 if scale is None else scale * np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(actual, expected, rtol=0.0 if scale else rtol, atol=atol, err_msg=f"{case}")
    assert np.shape(actual) == expected.shape, case
