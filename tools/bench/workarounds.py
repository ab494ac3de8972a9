"""The gain of each workaround for XLA:CPU: `python -m tools.bench.workarounds [NAME ...]`.

Each is switched off by itself, in a fresh process for each case. A line has the milliseconds of a loss with its
gradient without it and with it, the fastest of several calls each, and their ratio. TensorFlow or JAX, as
`KERAS_BACKEND` says. With names, only the cases of the workarounds that begin so.
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import keras
import numpy as np
from keras import ops

from keras_xent import kernels
from keras_xent.kernels import _compiled, _fast_steps, _sigmoid_terms, _softmax_row, _xla_cpu

ROUNDS = 5
ROWS, CLASSES, FEATURES = 1024, 32_000, 256
FEW_CLASSES = (65_536, 10)
# A case that takes longer is given up.
MOST_SECONDS = 120


class Case(NamedTuple):
    """A workaround, a loss, and what switches the workaround off: an object, one of its attributes, another value."""

    workaround: str
    work: str
    off: tuple[Any, str, Any]


CASES = (
    Case("map_row_blocks", "dense", (_xla_cpu, "_BLOCK_BYTES", 2**50)),
    Case("row_sum, row_max", "sparse", (_xla_cpu, "_MIN_SLICED_ROW", 2**50)),
    Case("row_sum, row_max", "binary", (_xla_cpu, "_MIN_SLICED_ROW", 2**50)),
    Case("bits_of, from_bits", "dense, bfloat16", (_compiled, "narrow_float", lambda tensor: "")),
    Case("cast_to_nearest_even", "sparse, bfloat16", (_softmax_row, "cast_to_nearest_even", ops.cast)),
    Case("log1p_polynomial", "binary", (_sigmoid_terms, "log1p_polynomial", ops.log1p)),
    Case("accumulate_matmul", "head", (_xla_cpu, "_STRIP_BYTES", 2**50)),
    Case("_fast_steps.py", "sparse, few classes", (_fast_steps, "FEW_NUMBERS", 2**50)),
    Case("_fast_steps.py", "dense, few classes", (_fast_steps, "FEW_NUMBERS", 2**50)),
)


def _work(name: str) -> tuple[Callable[[Any], Any], Any]:
    """The loss of that name, as a function of one tensor, and that tensor."""
    rng = np.random.default_rng(0)
    kind, _, kind_of_logits = name.partition(", ")
    if kind == "head":
        tokens = 4 * ROWS
        hidden = rng.standard_normal((tokens, FEATURES), "float32") / 16
        kernel = rng.standard_normal((FEATURES, CLASSES), "float32")
        many = rng.integers(0, CLASSES, tokens).astype("int32")
        return (
            lambda x: kernels.linear_cross_entropy(x, kernel, many, reduction="token_mean"),
            ops.convert_to_tensor(hidden),
        )
    shape = FEW_CLASSES if kind_of_logits == "few classes" else (ROWS, CLASSES)
    logits = ops.cast(rng.standard_normal(shape, "float32"), "bfloat16" if kind_of_logits == "bfloat16" else "float32")
    if kind == "sparse":
        labels = rng.integers(0, shape[1], shape[0]).astype("int32")
        return lambda x: ops.mean(kernels.sparse_softmax_cross_entropy(labels, x)), logits
    if kind == "binary":
        labels = ops.convert_to_tensor(rng.integers(0, 2, shape).astype("float32"))
        return lambda x: ops.mean(kernels.sigmoid_cross_entropy(labels, x, axis=-1)), logits
    targets = ops.softmax(ops.convert_to_tensor(rng.standard_normal(shape, "float32")))
    targets = ops.cast(targets, logits.dtype)
    return lambda x: ops.mean(kernels.softmax_cross_entropy(targets, x)), logits


def _step(function: Callable[[Any], Any], *, in_xla: bool) -> Callable[[Any], Any]:
    """A call of the function and its gradient that waits for both; on TensorFlow one program only with `in_xla`."""
    if keras.backend.backend() == "jax":
        import jax

        with_gradient = jax.jit(jax.value_and_grad(function))
        return lambda x: jax.block_until_ready(with_gradient(x))
    import tensorflow as tf

    @tf.function(autograph=False, jit_compile=in_xla)
    def program(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = function(x)
        return loss, tape.gradient(loss, x)

    return lambda x: program(x)[0].numpy()


def _milliseconds(case: Case, *, off: bool) -> float:
    _compiled.clear_cache()
    function, tensor = _work(case.work)
    with mock.patch.object(*case.off) if off else contextlib.nullcontext():
        step, times = _step(function, in_xla=case.off[0] is _fast_steps), []
        for _ in range(ROUNDS + 1):
            begin = time.perf_counter()
            step(tensor)
            times.append(time.perf_counter() - begin)
    return 1e3 * min(times[1:])


def measure(case: Case) -> None:
    """Prints a case's line."""
    without, with_it = _milliseconds(case, off=True), _milliseconds(case, off=False)
    print(
        f"{case.workaround:22} {case.work:20} {without:7.1f} ms {with_it:7.1f} ms {without / with_it:6.2f}", flush=True
    )


def main(names: list[str]) -> None:
    """Measures each workaround, without it and with it."""
    if names[:1] == ["--case"]:
        measure(CASES[int(names[1])])
        return
    print(
        f"{keras.backend.backend()}, logits [{ROWS}, {CLASSES}], few classes {list(FEW_CLASSES)}, head of {4 * ROWS} "
        f"tokens and {FEATURES} features"
    )
    print(f"{'workaround':22} {'work':20} {'without':>10} {'with':>10} {'ratio':>6}", flush=True)
    for number, case in enumerate(CASES):
        if names and not case.workaround.startswith(tuple(names)):
            continue
        command = [sys.executable, "-m", "tools.bench.workarounds", "--case", str(number)]
        try:
            done = subprocess.run(command, stderr=subprocess.PIPE, timeout=MOST_SECONDS, check=False, text=True)
            failure = done.stderr.strip().splitlines()[-1] if done.returncode else ""
        except subprocess.TimeoutExpired:
            failure = f"took more than {MOST_SECONDS} seconds"
        if failure:
            print(f"{case.workaround:22} {case.work:20} {failure}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
