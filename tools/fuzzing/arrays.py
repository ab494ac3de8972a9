"""The arrays of a call: random, and at the edges of what the kernels promise."""

import math
from dataclasses import replace

import numpy as np

from tools.fuzzing import draws
from tools.fuzzing.calls import Program

FEATURES, WIDTH, K, RANK = 5, 4, 6, 2
# Sequences of a group, and tokens of a sequence.
GROUP = 2, 3
_LABELS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")


def _labels(rng, program, shape, classes, *, may_be_bad=True):
    labels = rng.integers(0, classes, shape)
    if "ignore_class" in dict(program.options):
        labels = np.where(rng.random(shape) < 0.2, program.get("ignore_class"), labels)
    # An error where one can be raised, and then nothing else is compared; NaN of single rows elsewhere.
    share = 0.0 if not may_be_bad or (program.mode in ("eager", "graph") and rng.random() < 0.9) else 0.03
    labels = np.where(rng.random(shape) < share, rng.choice([-5, classes, 2**31 - 1, -(2**31)], shape), labels)
    if share:
        return labels.astype("int32")
    # Any dtype that has these numbers.
    signed = [d for d in _LABELS if not d.startswith("u") or labels.min(initial=0) >= 0]
    fits = [d for d in signed if np.array_equal(labels.astype(d).astype("int64"), labels)]
    return labels.astype(rng.choice(fits))


def of_logits(rng: np.random.Generator, program: Program) -> dict[str, np.ndarray]:
    """Of the kernels of logits and classes."""
    axis = program.get("axis", -1)
    shape = np.moveaxis(np.empty(program.shape), axis, -1).shape
    outer, classes = shape[:-1], shape[-1]
    rows = int(np.prod(outer))
    x = draws.logits(rng, rows, classes).reshape(shape)
    arrays = {
        "logits": np.moveaxis(x, -1, axis),
        "mask": rng.random(outer) < 0.7,
        "class_weight": draws.weights(rng, (classes,)),
        "upstream": draws.upstream(rng, outer),
    }
    if program.kernel == "softmax":
        targets = draws.distributions(rng, rows, classes).reshape(shape)
        arrays["targets"] = np.moveaxis(targets, -1, axis)
    else:
        arrays["labels"] = _labels(rng, program, outer, classes)
    return arrays


def of_sigmoid(rng: np.random.Generator, program: Program) -> dict[str, np.ndarray]:
    """Of `sigmoid_cross_entropy`."""
    shape = program.shape
    x = draws.logits(rng, shape[0], shape[1])
    y = draws.probabilities(rng, shape)
    if "focal_gamma" not in dict(program.options):
        y = np.where(rng.random(shape) < 0.02, rng.choice([-0.2, 1.2, -1.0, 2.0, 255.0], shape), y)
    if "ignore_class" in dict(program.options):
        y = np.where(rng.random(shape) < 0.2, program.get("ignore_class"), y)
    return {
        "logits": x,
        "labels": y,
        "mask": rng.random(shape) < 0.7,
        "pos_weight": draws.weights(rng, shape[1:]) + rng.integers(0, 2),
        "upstream": draws.upstream(rng, shape if program.get("axis") is None else shape[:-1]),
    }


def _matrices(rng, shape, of="", *, transpose=False, whole=False):
    tokens, features, classes = shape
    sizes = rng.choice([0.1, 1.0, 10.0, 300.0], (tokens, 1), p=[0.25, 0.5, 0.2, 0.05])
    hidden = rng.standard_normal((tokens, features)) * sizes
    kernel, bias = rng.standard_normal((features, classes)), rng.standard_normal(classes)
    if whole:
        # Products are exact, and there are ties.
        hidden, kernel, bias = np.round(hidden.clip(-8, 8)), np.round(kernel), np.round(bias)
    return {of + "hidden": hidden, of + "kernel": kernel.T if transpose else kernel, of + "bias": bias}


def _of_tokens(rng, program):
    """Matrices, and what all linear kernels have for each token."""
    tokens, features, classes = program.shape
    transpose, whole = program.get("transpose_kernel", False), rng.random() < 0.4
    arrays = _matrices(rng, program.shape, transpose=transpose, whole=whole)
    first, second = ((classes, RANK), (RANK, features)) if transpose else ((features, RANK), (RANK, classes))
    arrays |= {"first": rng.standard_normal(first), "second": rng.standard_normal(second)}
    if whole:
        arrays |= {name: np.round(arrays[name]) for name in ("first", "second")}
    name = program.get("reduction", "none")
    mask, weights = rng.random(tokens) < 0.7, draws.weights(rng, (tokens,), negative=rng.random() < 0.3)
    # What does not count may hold anything.
    hidden_by = [~mask] * ("mask" in program.given) + [weights == 0] * ("token_weights" in program.given)
    for unseen in hidden_by:
        arrays["hidden"][unseen] = rng.choice([draws.NAN, draws.INF, 3e38], (unseen.sum(), 1))
    upstream = rng.standard_normal(()) if name != "none" else draws.upstream(rng, (tokens,))
    return arrays | {"mask": mask, "token_weights": weights, "upstream": upstream}


def of_head(rng: np.random.Generator, program: Program) -> dict[str, np.ndarray]:
    """Of a linear kernel that needs a head alone."""
    arrays = _of_tokens(rng, program)
    if rng.random() < 0.2:
        # Classes that are never predicted.
        arrays["bias"][rng.random(program.shape[-1]) < 0.2] = -draws.INF
    return arrays


def of_linear(rng: np.random.Generator, program: Program) -> dict[str, np.ndarray]:
    """Of a linear kernel of labels."""
    arrays = of_head(rng, program)
    tokens, _, classes = program.shape
    if program.kernel == "linear_token_statistics":
        arrays["upstream"] = draws.upstream(rng, (3, tokens))
    # A mean with NaN in it says nothing of its other terms.
    may_be_bad = program.get("reduction", "none") == "none"
    arrays["labels"] = _labels(rng, program, (tokens,), classes, may_be_bad=may_be_bad)
    arrays["class_weight"] = draws.weights(rng, (classes,))
    return arrays


def of_soft_targets(rng: np.random.Generator, program: Program) -> dict[str, np.ndarray]:
    """Of `linear_softmax_cross_entropy`."""
    tokens, _, classes = program.shape
    targets = draws.distributions(rng, tokens, classes).astype("float32")
    return _of_tokens(rng, program) | {"targets": targets, "class_weight": draws.weights(rng, (classes,))}


def of_distillation(rng: np.random.Generator, program: Program) -> dict[str, np.ndarray]:
    """Of `linear_distillation`."""
    arrays = _of_tokens(rng, program)
    tokens, _, classes = program.shape
    whole = np.array_equal(arrays["kernel"], np.round(arrays["kernel"]))
    shape = (tokens, WIDTH, classes)
    arrays |= _matrices(rng, shape, "teacher_", transpose=program.get("transpose_teacher_kernel", False), whole=whole)
    for name in ("teacher_hidden", "teacher_kernel", "teacher_bias"):
        arrays[name] = draws.rounded(arrays[name], program.dtype)
    same_layout = program.get("transpose_kernel") == program.get("transpose_teacher_kernel")
    if rng.random() < 0.3 and "low_rank" not in program.given and same_layout:
        # A student that is nearly its teacher.
        near = 1 + 1e-3 * rng.standard_normal((tokens, 1))
        seen = np.isfinite(arrays["hidden"]).all(1)
        arrays["hidden"][seen, :WIDTH] = (arrays["teacher_hidden"] * near)[seen]
        arrays["hidden"][seen, WIDTH:] = 0
        first = (slice(None), slice(WIDTH)) if program.get("transpose_kernel") else slice(WIDTH)
        arrays["kernel"][first] = arrays["teacher_kernel"]
        arrays["bias"] = arrays["teacher_bias"]
    return arrays


def of_top_k(rng: np.random.Generator, program: Program) -> dict[str, np.ndarray]:
    """Of `linear_top_k_distillation`."""
    arrays = _of_tokens(rng, program)
    tokens, _, classes = program.shape
    ids = rng.permuted(np.tile(np.arange(max(classes, K)), (tokens, 1)), axis=1)[:, :K]
    odd = rng.random(ids.shape) < 0.05
    ids = np.where(odd, rng.choice([-1, 0], ids.shape), ids)
    arrays["ids"] = np.where(ids < classes, ids, -1).astype("int32")
    with np.errstate(divide="ignore"):
        arrays["log_probs"] = np.log(rng.dirichlet(np.full(K, 0.3), tokens)).astype("float32")
    return arrays


def of_groups(rng: np.random.Generator, program: Program) -> dict[str, np.ndarray]:
    """Of `linear_sequence_loss`, with log-probabilities of each sequence under a reference."""
    groups, features, classes = program.shape
    of_tokens = replace(program, shape=(groups * math.prod(GROUP), features, classes))
    arrays, shape = _of_tokens(rng, of_tokens), (groups, *GROUP)
    labels = _labels(rng, program, shape, classes, may_be_bad=False)
    upstream = draws.upstream(rng, (groups,)) if program.get("reduction") == "none" else rng.standard_normal(())
    return arrays | {
        "hidden": arrays["hidden"].reshape(*shape, features),
        "mask": arrays["mask"].reshape(shape),
        "labels": labels,
        "reference": rng.standard_normal(shape[:2]).astype("float32"),
        "upstream": upstream,
    }


def of_reduction(rng: np.random.Generator, program: Program) -> dict[str, np.ndarray]:
    """Of `reduce`."""
    losses = np.abs(rng.standard_normal(program.shape)) * rng.choice([0.1, 1, 50])
    valid, weights = rng.random(program.shape) < rng.choice([0.0, 0.7]), draws.weights(rng, program.shape)
    if rng.random() < 0.3:
        weights = draws.weights(rng, program.shape, negative=True)
    odd = rng.choice([draws.NAN, draws.INF, 3e38])
    if "valid" in program.given:
        losses = np.where(valid, losses, odd)
    if "weights" in program.given:
        losses = np.where(weights == 0, odd, losses)
    scalar = program.get("reduction") not in (None, "none")
    return {
        "losses": losses,
        "valid": valid,
        "weights": weights.astype("float32"),
        "label_weights": draws.weights(rng, program.shape).astype("float32"),
        "upstream": rng.standard_normal(() if scalar else program.shape).astype("float32"),
    }
