"""The kernels: the options that are drawn, the arrays of a call, and the function that is called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.fuzzing import arrays, draws, expected, expected_groups, expected_linear, expected_top_k
from tools.fuzzing.calls import Call, Program
from tools.fuzzing.expected import Expected

SOFTMAX = {
    "label_smoothing": (0.1, 0.5, 1.0),
    "focal_gamma": (0.5, 1.0, 2.0, 3.5),
    "z_loss": (1e-4, 0.1),
    "logit_softcap": (3.0, 30.0),
}
LINEAR = {"transpose_kernel": (True,), "chunk_bytes": (4 * 23 * 16,)}
STATISTICS = {"return_statistics": (("rank", "entropy", "logsumexp", "confidence"),)}
REDUCED = {"reduction": ("sum", "mean", "token_mean", "mean_with_sample_weight"), "normalizer": (7.0,)}
DISTILLED = {"temperature": (0.5, 2.0), "logit_softcap": (5.0,)}


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
    has_gradient: bool = True


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
    drawn = kernel.draw(rng, program)
    drawn.update({n: draws.rounded(a, program.dtype) for n, a in drawn.items() if n in kernel.differentiated})
    may_be_missing = {"mask", "token_weights", "class_weight", "first", "second", *kernel.optional}
    given = program.given | ({"first", "second"} if "low_rank" in program.given else set())
    needed = {n: a for n, a in drawn.items() if n not in may_be_missing or n in given}
    return Call(program, needed)


_ROWS = ((400, 2), (400, 7), (400, 7), (20, 20, 7), (4, 5, 20, 7), (400, 37), (16, 2100), (400, 1), (1, 7), (0, 7))
# Tokens, features and classes: several chunks, one, and none.
_TOKENS = ((160, 5, 23), (160, 5, 23), (160, 5, 23), (37, 5, 70), (160, 5, 1), (1, 5, 23), (0, 5, 23))
# The same with groups of tokens in place of tokens.
_GROUPS = ((27, 5, 23), (27, 5, 23), (27, 5, 23), (7, 5, 70), (27, 5, 1), (1, 5, 23), (0, 5, 23))
_ALL = ("hidden", "kernel", "bias", "first", "second")
KERNELS = {
    "softmax": Kernel(
        SOFTMAX | {"axis": (1, 0)},
        ("mask", "class_weight"),
        _ROWS,
        arrays.of_logits,
        ("logits", "targets"),
        expected.softmax,
    ),
    "sparse_softmax": Kernel(
        SOFTMAX | {"axis": (1, 0), "ignore_class": (-1, 0, 5)},
        ("mask", "class_weight"),
        _ROWS,
        arrays.of_logits,
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
        arrays.of_sigmoid,
        ("logits", "labels"),
        expected.sigmoid,
    ),
    "linear": Kernel(
        SOFTMAX | LINEAR | REDUCED | STATISTICS | {"ignore_class": (-1, 0), "training": (False,)},
        ("mask", "token_weights", "class_weight", "bias", "low_rank"),
        _TOKENS,
        arrays.of_linear,
        _ALL,
        expected_linear.cross_entropy,
    ),
    "linear_softmax": Kernel(
        SOFTMAX | LINEAR | REDUCED | {"training": (False,)},
        ("mask", "token_weights", "class_weight", "bias", "low_rank"),
        _TOKENS,
        arrays.of_soft_targets,
        _ALL,
        expected_linear.soft_targets,
    ),
    "linear_token_statistics": Kernel(
        LINEAR | DISTILLED | {"ignore_class": (-1, 0)},
        ("mask", "bias", "low_rank"),
        _TOKENS,
        arrays.of_linear,
        _ALL,
        expected_linear.statistics,
    ),
    "linear_sequence_loss": Kernel(
        LINEAR
        | DISTILLED
        | {
            "loss": ("ipo",),
            "normalize": (True,),
            "reduction": ("none", "sum", "token_mean"),
            "ignore_class": (-1, 0),
            "training": (False,),
        },
        ("mask", "bias", "low_rank"),
        _GROUPS,
        arrays.of_groups,
        _ALL,
        expected_groups.sequence_loss,
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
        ("mask", "token_weights", "bias", "teacher_bias", "low_rank"),
        _TOKENS,
        arrays.of_distillation,
        _ALL,
        expected_linear.distillation,
    ),
    "linear_top_k_distillation": Kernel(
        LINEAR | REDUCED | DISTILLED,
        ("mask", "token_weights", "bias", "low_rank"),
        _TOKENS,
        arrays.of_top_k,
        _ALL,
        expected_top_k.distillation,
    ),
    "linear_top_k": Kernel(
        LINEAR | DISTILLED | {"k": (1, 5, 23)},
        ("mask", "bias", "low_rank"),
        # With so many classes they are found by blocks, with a few left over.
        (*_TOKENS, (40, 5, 293)),
        arrays.of_head,
        _ALL,
        expected_top_k.classes,
        has_gradient=False,
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
        arrays.of_reduction,
        ("losses",),
        expected.reduction,
    ),
}
