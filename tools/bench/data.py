"""The inputs of a case, random and the same for every peer, as files. NumPy has no bfloat16: its bits are stored."""

from pathlib import Path

import numpy as np

IGNORED = -100
# Pairs of sequences for preference losses, classes that a stored teacher has, and the rank of trained factors.
PAIRS, TOP, RANK = 32, 64, 8
TEMPERATURE = 2.0
# The weight of the entropy in the loss of a policy.
ENTROPY_BONUS = 0.01
OF_HEADS = ("linear", "statistics", "accuracy", "policy", "top_k", "likeliest", "dpo", "distillation", "lora")


def write(case: dict, folder: Path) -> None:
    """The files of a case. Cases of whole models need none: they draw tokens themselves."""
    rng = np.random.default_rng(0)
    if case["question"] == "loss":
        arrays = _of_loss(rng, case)
    elif case["question"] in OF_HEADS:
        arrays = _of_head(rng, case)
    else:
        arrays = {}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def _of_loss(rng, case):
    rows, classes = case["rows"], case["classes"]
    logits = 3.0 * rng.standard_normal((rows, classes), "float32")
    arrays = {"logits": _as_stored(logits, case["dtype"])}
    if case["loss"] == "sparse":
        return arrays | {"labels": rng.integers(0, classes, rows, "int32")}
    # Targets are float32 with any logits, as in mixed precision.
    targets = rng.random((rows, classes), "float32")
    if case["loss"] == "sigmoid":
        return arrays | {"targets": np.round(targets)}
    return arrays | {"targets": targets / targets.sum(axis=1, keepdims=True)}


def _of_head(rng, case):
    tokens, features, classes = case["rows"], case["features"], case["classes"]
    # Of a scale that makes the softmax neither flat nor one-hot.
    kernel = rng.standard_normal((features, classes), "float32")
    kernel *= np.float32(2.0 / np.sqrt(features))
    labels = rng.integers(0, classes, tokens, "int32")
    ignored = rng.permutation(tokens)[round(case.get("valid", 1.0) * tokens) :]
    labels[ignored] = IGNORED
    hidden = rng.standard_normal((tokens, features), "float32")
    arrays = {"hidden": _as_stored(hidden, case["dtype"]), "kernel": _as_stored(kernel, case["dtype"])}
    more = {"distillation": _teacher, "top_k": _likeliest_classes, "lora": _factors}.get(case["question"])
    return arrays | {"labels": labels} | (more(rng, case) if more else {})


def _teacher(rng, case):
    kernel = rng.standard_normal((case["features"], case["classes"]), "float32")
    hidden = rng.standard_normal((case["rows"], case["features"]), "float32")
    kernel *= np.float32(2.0 / np.sqrt(case["features"]))
    arrays = {"teacher_hidden": hidden, "teacher_kernel": kernel}
    return {name: _as_stored(array, case["dtype"]) for name, array in arrays.items()}


def _likeliest_classes(rng, case):
    weights = np.exp(rng.standard_normal((case["rows"], TOP), "float32"))
    log_probs = np.log(weights / weights.sum(axis=1, keepdims=True))
    return {"ids": rng.integers(0, case["classes"], (case["rows"], TOP), "int32"), "log_probs": log_probs}


def _factors(rng, case):
    down, up = (case["features"], RANK), (RANK, case["classes"])
    return {name: 0.01 * rng.standard_normal(shape, "float32") for name, shape in (("down", down), ("up", up))}


def _as_stored(array, dtype):
    if dtype == "float32":
        return array
    import ml_dtypes

    return array.astype(getattr(ml_dtypes, dtype)).view("uint16")


def eager(case: dict) -> tuple[np.ndarray, np.ndarray]:
    """Labels and logits of any rank, which every library has in its process."""
    rng, shape = np.random.default_rng(0), case["logits"]
    return rng.integers(0, shape[-1], shape[:-1], "int32"), rng.standard_normal(shape, "float32")


def read(folder: str | Path, name: str) -> np.ndarray:
    """An array as it is stored, not yet in memory."""
    return np.load(Path(folder) / f"{name}.npy", mmap_mode="r")


def floats(stored: np.ndarray, dtype: str) -> np.ndarray:
    """An array of a file as float64."""
    if dtype != "float32":
        import ml_dtypes

        stored = stored.view(getattr(ml_dtypes, dtype))
    return stored.astype("float64")


def names(folder: str | Path) -> tuple[str, ...]:
    """The names of the arrays of a case."""
    return tuple(sorted(path.stem for path in Path(folder).glob("*.npy")))
