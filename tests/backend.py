"""Running a function in every mode of the backend, and differentiating it there."""

import functools
import os

import keras
import numpy as np
import pytest
from keras import ops

from tests import internals

BACKEND = keras.backend.backend()

if BACKEND == "tensorflow":
    import tensorflow as tf

    MODES = {
        "eager": lambda f: f,
        "graph": lambda f: tf.function(f, autograph=False),
        "xla": lambda f: tf.function(f, jit_compile=True, autograph=False),
    }
else:
    import jax

    MODES = {"eager": lambda f: f, "jit": jax.jit}

tensorflow_only = functools.partial(pytest.mark.skipif, BACKEND != "tensorflow")
# One mode with compiled kernels in uncompiled code and one where everything is one program: for sweeps over options,
# since each compilation takes a second.
TWO_MODES = ("eager", "xla" if BACKEND == "tensorflow" else "jit")
# Every mode; the fast suite takes the one where everything is one program.
every_mode = pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=() if mode == TWO_MODES[1] else pytest.mark.whole) for mode in MODES]
)
# JAX has float64 under JAX_ENABLE_X64=1.
HAS_FLOAT64 = BACKEND == "tensorflow" or jax.config.jax_enable_x64
DTYPES = ("float64", "float32", "bfloat16", "float16") if HAS_FLOAT64 else ("float32", "bfloat16", "float16")


def skip_on_accelerator(reason):
    """For what a GPU computes in another way, or does not check. Not a mark: to look for one starts the backend."""
    if internals.on_accelerator():
        pytest.skip(reason)


def value_and_gradient(function, argument, upstream=None, mode="eager"):
    """`function(argument)`, and the gradient for the argument of its product with `upstream` (default: ones)."""

    if BACKEND == "tensorflow":

        def run(argument):
            with tf.GradientTape() as tape:
                tape.watch(argument)
                value = function(argument)
            weights = ops.ones_like(value) if upstream is None else ops.cast(upstream, value.dtype)
            return value, tape.gradient(value, argument, output_gradients=weights)
    else:

        def run(argument):
            value, pull = jax.vjp(function, argument)
            weights = ops.ones_like(value) if upstream is None else ops.cast(upstream, value.dtype)
            return value, pull(weights)[0]

    value, gradient = MODES[mode](run)(argument)
    return to_numpy(value), to_numpy(gradient)


def with_gradients(function):
    """A function that returns what `function` does, a scalar and something else, and the scalar's gradients."""
    if BACKEND == "jax":
        return lambda *inputs: jax.value_and_grad(function, tuple(range(len(inputs))), has_aux=True)(*inputs)

    def step(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            scalar, aux = function(*inputs)
        return (scalar, aux), tape.gradient(scalar, inputs)

    return step


def optimized_hlo(function, *arrays):
    """The program that XLA makes of a function, as text."""
    if BACKEND == "jax":
        return jax.jit(function).lower(*arrays).compile().as_text()
    program = tf.function(function, jit_compile=True, autograph=False)
    return program.experimental_get_compiler_ir(*map(tf.convert_to_tensor, arrays))(stage="optimized_hlo")


def train_step_hlo(model, x, y):
    """The program that XLA makes of the training step of a model that has trained, as text."""
    if BACKEND == "tensorflow":
        return optimized_hlo(lambda x, y: model.train_step((x, y)), x, y)
    state = model._get_jax_state(
        trainable_variables=True, non_trainable_variables=True, optimizer_variables=True, metrics_variables=True
    )
    return optimized_hlo(model.train_step, state, (x, y))


def hessian_vector_product(function, argument, vector, upstream, mode="eager"):
    """The derivative along `vector` of the gradient of `sum(upstream function(argument))`."""
    if BACKEND == "tensorflow":

        def run(argument):
            with tf.GradientTape() as outer:
                outer.watch(argument)
                with tf.GradientTape() as inner:
                    inner.watch(argument)
                    value = tf.reduce_sum(function(argument) * upstream)
                gradient = inner.gradient(value, argument)
            return outer.gradient(gradient, argument, output_gradients=vector)
    else:

        def run(argument):
            return jax.jvp(jax.grad(lambda x: (function(x) * upstream).sum()), (argument,), (vector,))[1]

    return to_numpy(MODES[mode](run)(argument))


def tensor(array, dtype=None):
    """A tensor of the backend; NumPy has no bfloat16, so it is rounded on the way."""
    return ops.cast(ops.convert_to_tensor(array), dtype) if dtype else ops.convert_to_tensor(array)


def to_numpy(value):
    """A float64 array of the very values of the tensor (integers stay integers)."""
    value = ops.convert_to_numpy(ops.cast(value, "float32") if "16" in str(value.dtype) else value)
    return value.astype(np.float64) if value.dtype.kind == "f" else value


def environment(**more):
    """The environment for a fresh process that imports this very package."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "KERAS_BACKEND": BACKEND, "TF_CPP_MIN_LOG_LEVEL": "3", **more}
