"""The peers that run on JAX: our kernels and losses, and optax', each under `jax.jit`."""

import functools
import importlib.metadata
from collections.abc import Callable

import jax
import keras
import ml_dtypes
import numpy as np
from jax import numpy as jnp

import keras_xent
from tools.bench import data
from tools.bench.peers import outputs, scoring, training

CLASSES = {
    "sigmoid": "BinaryCrossentropy",
    "dense": "CategoricalCrossentropy",
    "sparse": "SparseCategoricalCrossentropy",
}


def peer(name: str, case: dict, folder: str) -> Callable:
    """One of the peers, ready to be called."""
    questions = {"loss": _of_loss, "linear": _of_head, "eager": _of_eager, "score": scoring.peer}
    questions |= dict.fromkeys(outputs.QUESTIONS, _of_output)
    of = questions.get(case["question"])
    return of(name, case, folder) if of else training.peer(name, case)


def arrays(results: dict) -> dict:
    """As NumPy arrays, in float32."""
    return {name: np.asarray(jnp.asarray(value, "float32")) for name, value in results.items()}


def versions() -> dict:
    """Of the packages."""
    found = {"jax": importlib.metadata.version("jax")}
    try:
        return found | {"optax": importlib.metadata.version("optax")}
    except importlib.metadata.PackageNotFoundError:
        return found


def forget() -> None:
    """Frees inputs and programs."""
    from keras_xent.kernels import _compiled

    _inputs.cache_clear()
    _compiled.clear_cache()
    keras.backend.clear_session()
    jax.clear_caches()


@functools.lru_cache(1)
def _inputs(folder, names, dtype):
    stored = [data.read(folder, name) for name in names]
    return jax.block_until_ready(
        tuple(jnp.array(a.view(ml_dtypes.bfloat16) if a.dtype == "uint16" else a) for a in stored)
    )


def _of_loss(name, case, folder):
    given, logits = _inputs(folder, ("labels" if case["loss"] == "sparse" else "targets", "logits"), case["dtype"])
    smoothing = case["smoothing"]
    if name == "floor":
        # One read of the logits and one write of their gradient, and a read of targets as large as they are.
        copy = jax.jit(lambda given, x: 2.0 * x + (given.astype(x.dtype) if given.ndim == 2 else 0))
        return _Call(copy, (given, logits), lambda copied: {"gradient": copied})
    if name.startswith("ours"):
        options = {"label_smoothing": smoothing} if smoothing else {}
        loss = getattr(keras_xent.losses, CLASSES[case["loss"]])(from_logits=True, **options)
    else:
        loss = functools.partial(_by_optax, case["loss"], smoothing)
    step = jax.jit(jax.value_and_grad(loss, 1))
    return _Call(step, (given, logits), lambda value, gradient: {"loss": value, "gradient": gradient})


def _by_optax(kind, smoothing, given, logits):
    import optax

    if kind == "sparse" and not smoothing:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, given)
    elif kind == "sparse":
        # As optax' own documentation has it: there are no sparse labels with smoothing.
        one_hot = jax.nn.one_hot(given, logits.shape[1], dtype=logits.dtype)
        losses = optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, smoothing))
    elif kind == "dense":
        losses = optax.softmax_cross_entropy(logits, optax.smooth_labels(given, smoothing) if smoothing else given)
    else:
        given = given * (1.0 - smoothing) + smoothing / 2.0 if smoothing else given
        losses = optax.sigmoid_binary_cross_entropy(logits, given)
    return jnp.mean(losses, dtype="float32")


def _of_eager(name, case, folder):
    """Steps outside of a program."""
    given, logits = map(jnp.asarray, data.eager(case))
    package = keras_xent.losses if name == "ours" else keras.losses
    step = jax.value_and_grad(getattr(package, CLASSES[case["loss"]])(from_logits=True), 1)
    call = _Call(step, (given, logits), lambda value, gradient: {"loss": value, "gradient": gradient})
    return training.repeated(call, case["steps"])


def _of_head(name, case, folder):
    hidden, kernel, labels = _inputs(folder, ("hidden", "kernel", "labels"), case["dtype"])

    if name == "floor":
        return _Call(jax.jit(_three_matmuls), (hidden, kernel), lambda *products: {"hidden": products[0]})

    def ours(hidden, kernel, labels):
        linear = keras_xent.kernels.linear_cross_entropy
        return linear(hidden, kernel, labels, ignore_class=data.IGNORED, reduction="token_mean")

    def by_optax(hidden, kernel, labels):
        import optax

        rounded = name == "optax, rounded logits"
        logits = jnp.matmul(hidden, kernel, preferred_element_type=None if rounded else "float32").astype("float32")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        valid = labels != data.IGNORED
        return jnp.sum(jnp.where(valid, losses, 0.0)) / jnp.sum(valid)

    loss = ours if name.startswith("ours") else by_optax
    if not case.get("gradients", True):
        return _Call(jax.jit(loss), (hidden, kernel, labels), lambda value: {"loss": value})
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))

    def named(value, gradients):
        return {"loss": value, "hidden": gradients[0], "kernel": gradients[1]}

    return _Call(step, (hidden, kernel, labels), named)


def _of_output(name, case, folder):
    """Other losses of a head."""
    names = data.names(folder)
    arrays = dict(zip(names, _inputs(folder, names, case["dtype"]), strict=True))
    loss, trained = outputs.peer(name, case)
    # What is not trained is an argument too, or it would be a constant of the program.
    inputs = {name: arrays.pop(name) for name in trained}
    step = jax.jit(jax.value_and_grad(lambda inputs, others: loss(inputs | others), has_aux=True))
    return _Call(step, (inputs, arrays), lambda value, gradients: {"loss": value[0], **value[1], **gradients})


def _three_matmuls(hidden, kernel):
    logits = hidden @ kernel
    return logits @ kernel.T, hidden.T @ logits


class _Call:
    """A program with its inputs. `launch` does not wait for the results, as steps in `fit` do not."""

    def __init__(self, program, inputs, named):
        self.program, self.inputs, self._named = program, inputs, named

    def launch(self):
        return self.program(*self.inputs)

    def __call__(self):
        results = jax.block_until_ready(self.launch())
        return self._named(*results) if isinstance(results, tuple) else self._named(results)


def device_megabytes(call: _Call) -> float:
    """What a program needs beside its inputs: its results, and what XLA has reserved for it."""
    memory = call.program.lower(*call.inputs).compile().memory_analysis()
    return (memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes) / 1e6
