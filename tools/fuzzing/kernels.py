"""The kernels: the options that are drawn, the arrays of a call, and the function that is called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.fuzzing import draws, expected, expected_linear
from tools.fuzzing.calls import Call, Program
from tools.fuzzing.expected import Expected

SOFTMAX = {
    "label_smoothing": (0.1, 0.5, 1.0),
    "focal_gamma": (0.5, 1.0, 2.0, 3.5),
    "z_loss": (1e-4, 0.1),
    "logit_softcap": (3.0, 30.0),
}
LINEAR = {"transpose_kernel": (True,), "chunk_bytes": (4 * 23 * 16,)}
REDUCED = {"reduction": ("sum", "mean", "token_mean", "mean_with_sample_weight"), "normalizer": (7.0,)}
DISTILLED = {"temperature": (0.5, 2.0), "logit_softcap": (5.0,)}
TOKENS, FEATURES, CLASSES, WIDTH, K = 160, 5, 23, 4, 6


@dataclass(frozen=True)
class Kernel:
    """The inputs that are drawn for a kernel, and the expected results."""

    options: dict[str, tuple]
    # Arrays that may be left out.
    optional: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    draw: Callable[[np.random.Generator, Program], dict[str, np.ndarray]]
    # The arrays that have a gradient, in the order in which the function takes them first.
    differentiated: tuple[str, ...]
    expected: Callable[[Call], Expected]


def draw_program(rng: np.random.Generator, name: str, modes: Any, dtypes: Any) -> Program:
    """A program of this kernel: each option is taken in a third of all programs."""
    kernel = KERNELS[name]
    shape = kernel.shapes[rng.integers(len(kernel.shapes))]
    options = {n: v[rng.integers(len(v))] for n, v in kernel.options.items() if rng.random() < 0.35}
    if "axis" in options and name != "sigmoid" and len(shape) < 3:
        del options["axis"]
    given = frozenset(n for n in kernel.optional if rng.random() < 0.4)
    dtype = "float32" if rng.random() < 0.5 else str(rng.choice(dtypes))
    if options.get("reduction") is None and "normalizer" in options:
        del options["normalizer"]
    if name == "reduction" and "16" in dtype:
        dtype = "float32"
    return Program(name, str(rng.choice(modes)), dtype, shape, tuple(sorted(options.items())), given)


def draw_call(rng: np.random.Generator, program: Program) -> Call:
    """Arrays for a program."""
    kernel = KERNELS[program.kernel]
    arrays = kernel.draw(rng, program)
    rounded = {n: draws.rounded(a, program.dtype) for n, a in arrays.items() if n in kernel.differentiated}
    arrays.update(rounded)
    may_be_missing = {"mask", "token_weights", "class_weight", *kernel.optional}
    needed = {n: a for n, a in arrays.items() if n not in may_be_missing or n in program.given}
    return Call(program, needed)


def _labels(rng, program, shape, classes, *, may_be_bad=True):
    labels = rng.integers(0, classes, shape)
    if "ignore_class" in dict(program.options):
        labels = np.where(rng.random(shape) < 0.2, program.get("ignore_class"), labels)
    # An error where one can be raised, and then nothing else is compared; NaN of single rows elsewhere.
    share = 0.0 if not may_be_bad or (program.mode in ("eager", "graph") and rng.random() < 0.9) else 0.03
    labels = np.where(rng.random(shape) < share, rng.choice([-5, classes, 2**31 - 1, -(2**31)], shape), labels)
    small = share == 0 and labels.min(initial=0) >= -128 and labels.max(initial=0) < 128
    return labels.astype(rng.choice(["int8", "int32", "int64"]) if small else "int32")


def _of_logits(rng, program):
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


def _of_sigmoid(rng, program):
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


def _matrices(rng, of="", features=FEATURES, *, transpose=False, whole=False):
    hidden = rng.standard_normal((TOKENS, features)) * rng.choice([0.1, 1.0, 1.0, 10.0], (TOKENS, 1))
    kernel, bias = rng.standard_normal((features, CLASSES)), rng.standard_normal(CLASSES)
    if whole:
        # Products are exact, and there are ties.
        hidden, kernel, bias = np.round(hidden.clip(-8, 8)), np.round(kernel), np.round(bias)
    return {of + "hidden": hidden, of + "kernel": kernel.T if transpose else kernel, of + "bias": bias}


def _of_linear(rng, program):
    arrays = _matrices(rng, transpose=program.get("transpose_kernel", False), whole=rng.random() < 0.4)
    name = program.get("reduction", "none")
    mask, weights = rng.random(TOKENS) < 0.7, draws.weights(rng, (TOKENS,), negative=rng.random() < 0.3)
    # What does not count may hold anything.
    hidden_by = [~mask] * ("mask" in program.given) + [weights == 0] * ("token_weights" in program.given)
    for unseen in hidden_by:
        arrays["hidden"][unseen] = rng.choice([draws.NAN, draws.INF, 3e38], (unseen.sum(), 1))
    upstream = rng.standard_normal(()) if name != "none" else draws.upstream(rng, (TOKENS,))
    if program.kernel == "linear_token_statistics":
        upstream = draws.upstream(rng, (3, TOKENS))
    arrays |= {
        "mask": mask,
        "token_weights": weights,
        # A mean with NaN in it says nothing of its other terms.
        "labels": _labels(rng, program, (TOKENS,), CLASSES, may_be_bad=name == "none"),
        "class_weight": draws.weights(rng, (CLASSES,)),
        "upstream": upstream,
    }
    return arrays


def _of_distillation(rng, program):
    arrays = _of_linear(rng, program)
    whole = np.array_equal(arrays["kernel"], np.round(arrays["kernel"]))
    arrays |= _matrices(rng, "teacher_", WIDTH, transpose=program.get("transpose_teacher_kernel", False), whole=whole)
    for name in ("teacher_hidden", "teacher_kernel", "teacher_bias"):
        arrays[name] = draws.rounded(arrays[name], program.dtype)
    if rng.random() < 0.3 and program.get("transpose_kernel") == program.get("transpose_teacher_kernel"):
        # A student that is nearly its teacher.
        near = 1 + 1e-3 * rng.standard_normal((TOKENS, 1))
        seen = np.isfinite(arrays["hidden"]).all(1)
        arrays["hidden"][seen, :WIDTH] = (arrays["teacher_hidden"] * near)[seen]
        arrays["hidden"][seen, WIDTH:] = 0
        first = (slice(None), slice(WIDTH)) if program.get("transpose_kernel") else slice(WIDTH)
        arrays["kernel"][first] = arrays["teacher_kernel"]
        arrays["bias"] = arrays["teacher_bias"]
    del arrays["labels"], arrays["class_weight"]
    return arrays


def _of_top_k(rng, program):
    arrays = _of_linear(rng, program)
    del arrays["labels"], arrays["class_weight"]
    ids = np.stack([rng.permutation(CLASSES)[:K] for _ in range(TOKENS)])
    odd = rng.random(ids.shape) < 0.05
    arrays["ids"] = np.where(odd, rng.choice([-1, CLASSES, 0], ids.shape), ids).astype("int32")
    with np.errstate(divide="ignore"):
        arrays["log_probs"] = np.log(rng.dirichlet(np.full(K, 0.3), TOKENS)).astype("float32")
    return arrays


def _of_reduction(rng, program):
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


_ROWS = ((400, 2), (400, 7), (400, 7), (20, 20, 7), (400, 37), (16, 2100), (400, 1), (1, 7), (0, 7))
_TOKENS = ((TOKENS, FEATURES, CLASSES),)
_ALL = ("hidden", "kernel", "bias")
KERNELS = {
    "softmax": Kernel(
        SOFTMAX | {"axis": (1, 0)},
        ("mask", "class_weight"),
        _ROWS,
        _of_logits,
        ("logits", "targets"),
        expected.softmax,
    ),
    "sparse_softmax": Kernel(
        SOFTMAX | {"axis": (1, 0), "ignore_class": (-1, 0, 5)},
        ("mask", "class_weight"),
        _ROWS,
        _of_logits,
        ("logits",),
        expected.sparse,
    ),
    "sigmoid": Kernel(
        {
            "axis": (-1, 1),
            "ignore_class": (draws.NAN, -1.0, 0.0),
            "label_smoothing": (0.1, 1.0),
            "focal_gamma": (0.5, 2.0),
            "focal_alpha": (0.25,),
        },
        ("mask", "pos_weight"),
        ((100, 5), (400, 1), (0, 5), (1, 1)),
        _of_sigmoid,
        ("logits", "labels"),
        expected.sigmoid,
    ),
    "linear": Kernel(
        SOFTMAX | LINEAR | REDUCED | {"ignore_class": (-1, 0), "training": (False,)},
        ("mask", "token_weights", "class_weight", "bias"),
        _TOKENS,
        _of_linear,
        _ALL,
        expected_linear.cross_entropy,
    ),
    "linear_token_statistics": Kernel(
        LINEAR | DISTILLED | {"ignore_class": (-1, 0)},
        ("mask", "bias"),
        _TOKENS,
        _of_linear,
        _ALL,
        expected_linear.statistics,
    ),
    "linear_distillation": Kernel(
        LINEAR
        | REDUCED
        | DISTILLED
        | {
            "transpose_teacher_kernel": (True,),
            "divergence": ("reverse_kl", "jensen_shannon", "jensen_shannon"),
            "beta": (0.1,),
        },
        ("mask", "token_weights", "bias", "teacher_bias"),
        _TOKENS,
        _of_distillation,
        _ALL,
        expected_linear.distillation,
    ),
    "linear_top_k_distillation": Kernel(
        LINEAR | REDUCED | DISTILLED,
        ("mask", "token_weights", "bias"),
        _TOKENS,
        _of_top_k,
        _ALL,
        expected_linear.top_k,
    ),
    "reduction": Kernel(
        {
            "reduction": (
                "sum_over_batch_size",
                "mean",
                "sum",
                "mean_with_sample_weight",
                "token_mean",
                "sequence_mean",
            ),
            "normalizer": (7.0,),
        },
        ("valid", "weights", "label_weights"),
        ((50,), (9, 11), (0,), (3, 400)),
        _of_reduction,
        ("losses",),
        expected.reduction,
    ),
}
