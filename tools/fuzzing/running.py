"""Running a call in one of the modes of the backend."""

import functools
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_xent import kernels
from keras_xent.kernels.reduction import reduce
from tests.backend import BACKEND, MODES, to_numpy
from tools.fuzzing.calls import Call, Program
from tools.fuzzing.expected_groups import LOSSES
from tools.fuzzing.expected_top_k import k_of
from tools.fuzzing.kernels import KERNELS

if BACKEND == "tensorflow":
    import tensorflow as tf
else:
    import jax


def is_expected_error(error: Exception) -> bool:
    """Returns whether the error is that of a label out of range."""
    names = [type(error), *type(error).__mro__]
    return "must be classes from 0" in str(error) and any(
        n.__name__ in ("ValueError", "InvalidArgumentError") for n in names
    )


def _call_kernel(program: Program, arrays: dict[str, Any]) -> tuple[Any, ...]:
    """The values of the kernel, a tuple."""
    options = dict(program.options)
    a = dict(arrays)
    del a["upstream"]
    if "first" in a:
        a["low_rank"] = a.pop("first"), a.pop("second")
    # With these names the kernels take them.
    match program.kernel:
        case "softmax":
            return (kernels.softmax_cross_entropy(a.pop("targets"), a.pop("logits"), **a, **options),)
        case "sparse_softmax":
            return (kernels.sparse_softmax_cross_entropy(a.pop("labels"), a.pop("logits"), **a, **options),)
        case "sigmoid":
            return (kernels.sigmoid_cross_entropy(a.pop("labels"), a.pop("logits"), **a, **options),)
        case "linear":
            result = kernels.linear_cross_entropy(**a, **options)
            if "return_statistics" not in options:
                return (result,)
            loss, found = result
            return (loss, found.nll, found.rank, found.entropy, found.logsumexp, found.confidence)
        case "linear_softmax":
            return (kernels.linear_softmax_cross_entropy(**a, **options),)
        case "linear_sequence_loss":
            loss = LOSSES[options.pop("loss", "dpo")]
            references = tuple(a["reference"][:, i] for i in range(2))
            del a["reference"]
            return (kernels.linear_sequence_loss(**a, loss=loss, arrays=references, **options),)
        case "linear_token_statistics":
            return tuple(kernels.linear_token_statistics(**a, **options))
        case "linear_top_k":
            return tuple(kernels.linear_top_k(**a, **options | {"k": k_of(program)}))
        case "linear_distillation":
            return (kernels.linear_distillation(**a, **options),)
        case "linear_top_k_distillation":
            return (kernels.linear_top_k_distillation(**a, **options),)
        case _:
            return (reduce(a.pop("losses"), **({"reduction": None} | options), **a),)


@functools.cache
def _step(program: Program, names: tuple[str, ...]) -> Any:
    """A function of the arrays of these names, that gives values and gradients; compiled once."""
    differentiated = [n for n in KERNELS[program.kernel].differentiated if n in names]

    def values_of(wanted, others):
        return _call_kernel(program, dict(zip(differentiated, wanted, strict=True)) | others)

    def split(arrays):
        given = dict(zip(names, arrays, strict=True))
        return [given[n] for n in differentiated], {n: a for n, a in given.items() if n not in differentiated}

    def weights_of(values, upstream):
        upstream = ops.cast(upstream, values[0].dtype)
        if program.kernel != "linear_token_statistics":
            first, *others = values
            return (ops.reshape(upstream, ops.shape(first)), *map(ops.zeros_like, others))
        return (*(upstream[i] for i in range(3)), ops.zeros_like(values[3]))

    if not KERNELS[program.kernel].has_gradient:

        def step(*arrays):
            return values_of(*split(arrays)), ()

    elif BACKEND == "tensorflow":

        def step(*arrays):
            wanted, others = split(arrays)
            with tf.GradientTape() as tape:
                tape.watch(wanted)
                values = values_of(wanted, others)
            upstream = weights_of(values, others["upstream"])
            return values, tape.gradient(values, wanted, output_gradients=upstream)
    else:

        def step(*arrays):
            wanted, others = split(arrays)
            values, pull = jax.vjp(lambda *wanted: values_of(wanted, others), *wanted)
            return values, pull(weights_of(values, others["upstream"]))

    return MODES[program.mode](step)


def run(call: Call) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Values, and gradients by name."""
    program = call.program
    kernel, names = KERNELS[program.kernel], tuple(sorted(call.arrays))
    own = (*kernel.differentiated, "teacher_hidden", "teacher_kernel", "teacher_bias", "label_weights")
    tensors = [
        ops.cast(call.arrays[n], program.dtype) if n in own else ops.convert_to_tensor(call.arrays[n]) for n in names
    ]
    values, gradients = _step(program, names)(*tensors)
    differentiated = [n for n in kernel.differentiated if n in names] if kernel.has_gradient else []
    return [to_numpy(v) for v in values], {n: to_numpy(g) for n, g in zip(differentiated, gradients, strict=True)}


def forget() -> None:
    """Frees all programs."""
    from keras_xent.kernels import _compiled

    _step.cache_clear()
    _compiled.clear_cache()
    keras.backend.clear_session()
    if BACKEND == "jax":
        jax.clear_caches()
