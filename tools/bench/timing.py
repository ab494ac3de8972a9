"""How long do forward and backward take?"""

import time
from collections.abc import Callable, Iterator

import tensorflow as tf

from tools.bench import floor, losses
from tools.bench.shapes import LANGUAGE_MODEL, SHAPES, Shape

DTYPES = ("float32", "bfloat16")
WARM_UP = 2
# How far two right answers may lie apart: the loss, and the gradient in units of its largest element.
TOLERANCES = {"float32": (2e-5, 1e-5), "bfloat16": (2e-5, 1e-2)}


def measure(row: str, rounds: int) -> Iterator[dict]:
    """One record for each shape and dtype: the milliseconds of every call, by peer."""
    for shape in SHAPES if row == "sparse" else (LANGUAGE_MODEL,):
        for dtype in DTYPES:
            times = _times(row, shape, dtype, rounds)
            yield {"row": row, "shape": shape._asdict(), "dtype": dtype, "milliseconds": times}


def _times(row: str, shape: Shape, dtype: str, rounds: int) -> dict[str, list[float]]:
    labels, logits = losses.inputs(row, shape, dtype)
    peers = losses.peers(row)
    _must_agree({name: peer(labels, logits) for name, peer in peers.items()}, dtype)
    calls = {name: lambda peer=peer: peer(labels, logits)[1] for name, peer in peers.items()}
    calls["floor"] = floor.traffic(labels, logits)
    return in_turn(calls, rounds)


def in_turn(calls: dict[str, Callable[[], tf.Tensor]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, warm: two rounds are not counted.

    A B C, B C A, C A B: what else the machine does meets all of them, and so does what the call before has left behind.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(-WARM_UP, rounds):
        names = names[1:] + names[:1]
        for name in names:
            start = time.perf_counter()
            calls[name]()[-1, -1].numpy()  # waits for the gradient
            elapsed = time.perf_counter() - start
            if turn >= 0:
                times[name].append(round(1e3 * elapsed, 3))
    return times


def _must_agree(results, dtype):
    loss_tolerance, gradient_tolerance = TOLERANCES[dtype]
    (first, (loss, gradient)), *others = results.items()
    largest = _largest(gradient)
    for name, (other_loss, other_gradient) in others:
        loss_error = abs(float(other_loss) / float(loss) - 1.0)
        gradient_error = _largest(gradient - other_gradient) / largest
        # Written so that NaN does not pass.
        if not (loss_error <= loss_tolerance and gradient_error <= gradient_tolerance):
            raise AssertionError(
                f"{name} and {first} differ by {loss_error:.1e} in the loss and {gradient_error:.1e} in the gradient."
            )


def _largest(tensor):
    return float(tf.reduce_max(tf.abs(tensor)))
