"""Do all peers do the same work? Their losses and gradients against float64 NumPy, before anything is timed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tools.bench import data, expected_of_heads

# How far an answer may lie from the right one: the loss by its size, a gradient by its largest element. With 16-bit
# logits some peers compute in 16 bits, and round each loss and each probability.
TOLERANCES = {"float32": (2e-5, 1e-4), "bfloat16": (2e-2, 2e-2)}
_BLOCK = 2**22


class Disagreement(Exception):
    """Two peers do not do the same work."""


def must_agree(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], dtype: str) -> None:
    """Raises Disagreement, which says where and by how much, unless every array is as expected."""
    for_loss, for_gradient = TOLERANCES[dtype]
    for name, error in errors(found, expected).items():
        tolerance = for_loss if name == "loss" else for_gradient
        # Written so that NaN does not pass.
        if not error <= tolerance:
            raise Disagreement(f"not the same result: {name} is off by {error:.1e}, and {tolerance} may be")


def errors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest error of each array, over its largest value."""
    by_name = {}
    for name, right in expected.items():
        if name not in found or np.shape(found[name]) != np.shape(right):
            raise Disagreement(f"not the same work: {name} of shape {np.shape(found.get(name))}, not {np.shape(right)}")
        # Not max(), which leaves out a NaN that is not the first.
        error = np.max([np.abs(a - b).max() for a, b in _in_blocks(found[name], right)])
        largest = np.max([np.abs(b).max() for _, b in _in_blocks(found[name], right)])
        by_name[name] = float(error / largest) if error else 0.0
    return by_name


def _in_blocks(*arrays) -> Iterator[tuple]:
    flat = [np.reshape(array, -1) for array in arrays]
    for start in range(0, flat[0].size, _BLOCK):
        yield tuple(array[start : start + _BLOCK].astype("float64") for array in flat)


def reference(case: dict, folder: Path) -> dict[str, np.ndarray] | None:
    """Loss and gradients by float64 NumPy; None for whole models, which are compared with the first of the peers."""
    if case["question"] == "loss":
        return _of_loss(case, folder)
    return expected_of_heads.expected(case, folder) if case["question"] in data.OF_HEADS else None


def _of_loss(case, folder):
    logits = data.read(folder, "logits")
    given = data.read(folder, "labels" if case["loss"] == "sparse" else "targets")
    rows, classes = logits.shape
    part = min(rows, case.get("compared", rows))  # rows of the gradient
    smoothing, total, gradient = case["smoothing"], 0.0, np.empty((part, classes), "float32")
    step = max(1, _BLOCK // classes)
    for start in range(0, rows, step):
        block = slice(start, start + step)
        x = data.floats(logits[block], case["dtype"])
        if case["loss"] == "sparse":
            targets = np.zeros(x.shape)
            targets[np.arange(len(x)), given[block]] = 1.0
        else:
            targets = given[block].astype("float64")
        if case["loss"] == "sigmoid":
            targets = targets * (1 - smoothing) + smoothing / 2
            losses = np.maximum(x, 0) - x * targets + np.log1p(np.exp(-np.abs(x)))
            gradient[block] = ((1 / (1 + np.exp(-x)) - targets) / logits.size)[: max(0, part - start)]
            total += losses.sum() / logits.size
        else:
            targets = targets * (1 - smoothing) + smoothing / classes
            log_p = x - x.max(axis=1, keepdims=True)
            log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
            if start < part:
                d_x = (np.exp(log_p) * targets.sum(axis=1, keepdims=True) - targets) / rows
                gradient[block] = d_x[: part - start]
            total -= (targets * log_p).sum() / rows
    return {"loss": np.asarray(total), "gradient": gradient}
