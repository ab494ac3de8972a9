"""Do all peers do the same work? Their losses and gradients against float64 NumPy, before anything is timed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tools.bench import data

# How far an answer may lie from the right one: the loss by its size, a gradient by its largest element. With 16-bit
# logits some peers compute in 16 bits, and round each loss and each probability.
TOLERANCES = {"float32": (2e-5, 1e-4), "bfloat16": (2e-2, 2e-2)}
_BLOCK = 2**22


class Disagreement(Exception):
    """Two peers do not do the same work."""


def must_agree(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], dtype: str) -> None:
    """Raises Disagreement, which says where and by how much, unless every array is as expected."""
    for_loss, for_gradient = TOLERANCES[dtype]
    for name, right in expected.items():
        if name not in found or np.shape(found[name]) != np.shape(right):
            raise Disagreement(f"not the same work: {name} of shape {np.shape(found.get(name))}, not {np.shape(right)}")
        error = max(np.abs(a - b).max() for a, b in _in_blocks(found[name], right))
        largest = max(np.abs(b).max() for _, b in _in_blocks(found[name], right))
        tolerance = for_loss if name == "loss" else for_gradient
        # Written so that NaN does not pass.
        if not error <= tolerance * largest:
            raise Disagreement(f"not the same result: {name} is off by {error / largest:.1e}, and {tolerance} may be")


def _in_blocks(*arrays) -> Iterator[tuple]:
    flat = [np.reshape(array, -1) for array in arrays]
    for start in range(0, flat[0].size, _BLOCK):
        yield tuple(array[start : start + _BLOCK].astype("float64") for array in flat)


def reference(case: dict, folder: Path) -> dict[str, np.ndarray] | None:
    """Loss and gradients by float64 NumPy; None for whole models, which are compared with the first of the peers."""
    if case["question"] == "loss":
        return _of_loss(case, folder)
    return _of_head(case, folder) if case["question"] == "linear" else None


def _of_loss(case, folder):
    logits = data.read(folder, "logits")
    given = data.read(folder, "labels" if case["loss"] == "sparse" else "targets")
    rows, classes = logits.shape
    part = min(rows, case.get("compared", rows))  # rows of the gradient
    smoothing, total, gradient = case["smoothing"], 0.0, np.empty((part, classes), "float32")
    step = max(1, _BLOCK // classes)
    for start in range(0, rows, step):
        block = slice(start, start + step)
        x = _floats(logits[block], case["dtype"])
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


def _floats(stored, dtype):
    if dtype != "float32":
        import ml_dtypes

        stored = stored.view(getattr(ml_dtypes, dtype))
    return stored.astype("float64")


def _of_head(case, folder):
    hidden, kernel, labels = (np.asarray(data.read(folder, name)) for name in ("hidden", "kernel", "labels"))
    hidden, kernel = (_floats(array, case["dtype"]) for array in (hidden, kernel))
    valid = np.flatnonzero(labels != data.IGNORED)
    part = case.get("compared", len(hidden) + len(kernel))  # rows of each gradient
    total, for_hidden, for_kernel = 0.0, np.zeros(hidden.shape), np.zeros(kernel[:part].shape)
    step = max(1, 2**24 // kernel.shape[1])
    for chosen in np.split(valid, range(step, len(valid), step)):
        x = hidden[chosen]
        log_p = x @ kernel
        log_p -= log_p.max(axis=1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
        places = np.arange(len(chosen)), labels[chosen]
        total -= log_p[places].sum()
        share = np.exp(log_p, out=log_p)
        share[places] -= 1.0
        compared = chosen < part
        for_hidden[chosen[compared]] = share[compared] @ kernel.T
        for_kernel += x[:, :part].T @ share
    if not case.get("gradients", True):
        return {"loss": np.asarray(total / len(valid))}
    gradients = {"hidden": for_hidden[:part] / len(valid), "kernel": for_kernel / len(valid)}
    return {"loss": np.asarray(total / len(valid)), **gradients}
