"""The gain of each workaround for XLA:CPU: `python -m tools.bench.workarounds`.

Each is switched off by itself. A line has the milliseconds of a loss with its gradient without it and with it, the
fastest of several calls each, and their ratio. TensorFlow or JAX, as `KERAS_BACKEND` says.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import keras
import numpy as np
from keras import ops

from keras_xent import kernels
from keras_xent.kernels import _compiled, _softmax_row, _xla_cpu

ROUNDS = 15
ROWS, CLASSES, FEATURES = 2048, 32_000, 256


class Case(NamedTuple):
    workaround: str
    work: str
    # The kernel, as a function of one differentiable tensor.
    function: Callable[[Any], Any]
    tensor: Any
    # What switches the workaround off: an object, one of its attributes, another value.
    off: tuple[Any, str, Any]


def _cases() -> Iterator[Case]:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((ROWS, CLASSES), "float32")
    labels = rng.integers(0, CLASSES, ROWS).astype("int32")
    targets = ops.softmax(ops.convert_to_tensor(rng.standard_normal((ROWS, CLASSES), "float32")))
    narrow = ops.cast(logits, "bfloat16")

    def dense(x):
        return ops.mean(kernels.softmax_cross_entropy(ops.cast(targets, x.dtype), x))

    def sparse(x):
        return ops.mean(kernels.sparse_softmax_cross_entropy(labels, x))

    hidden = rng.standard_normal((8 * ROWS, FEATURES), "float32") / 16
    kernel = rng.standard_normal((FEATURES, CLASSES), "float32")
    many = rng.integers(0, CLASSES, 8 * ROWS).astype("int32")

    def head(x):
        return kernels.linear_cross_entropy(x, kernel, many, reduction="token_mean")

    logits, hidden = ops.convert_to_tensor(logits), ops.convert_to_tensor(hidden)
    yield Case("map_row_blocks", "dense", dense, logits, (_xla_cpu, "_BLOCK_BYTES", 2**50))
    yield Case("row_sum, row_max", "sparse", sparse, logits, (_xla_cpu, "_MIN_SLICED_ROW", 2**50))
    yield Case("bits_of, from_bits", "dense, bfloat16", dense, narrow, (_compiled, "narrow_float", lambda tensor: ""))
    yield Case(
        "cast_to_nearest_even", "sparse, bfloat16", sparse, narrow, (_softmax_row, "cast_to_nearest_even", ops.cast)
    )
    yield Case("accumulate_matmul", "head", head, hidden, (_xla_cpu, "_STRIP_BYTES", 2**50))


def _step(function: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A call of the function and its gradient that waits for both."""
    if keras.backend.backend() == "jax":
        import jax

        program = jax.jit(jax.value_and_grad(function))
        return lambda x: jax.block_until_ready(program(x))
    import tensorflow as tf

    @tf.function(autograph=False)
    def program(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = function(x)
        return loss, tape.gradient(loss, x)

    return lambda x: [array.numpy() is None for array in program(x)[:1]]


def _milliseconds(case: Case, *, off: bool) -> float:
    _compiled.clear_cache()
    with mock.patch.object(*case.off) if off else contextlib.nullcontext():
        step, times = _step(case.function), []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            step(case.tensor)
            times.append(time.perf_counter() - begin)
    return 1e3 * min(times)


def main() -> None:
    """Measures each workaround, without it and with it."""
    print(f"{keras.backend.backend()}, logits [{ROWS}, {CLASSES}], head of {8 * ROWS} tokens and {FEATURES} features")
    print(f"{'workaround':22} {'work':18} {'without':>9} {'with':>9} {'ratio':>6}")
    for case in _cases():
        without, with_it = _milliseconds(case, off=True), _milliseconds(case, off=False)
        print(
            f"{case.workaround:22} {case.work:18} {without:6.0f} ms {with_it:6.0f} ms {without / with_it:6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
