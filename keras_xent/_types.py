"""Names of types for annotations."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

# A tensor of the backend, or anything that the backend turns into one (NumPy arrays, lists of numbers).
Tensor: TypeAlias = Any
# Sizes of the axes; None for a size that is known only when the program runs.
Shape: TypeAlias = tuple[int | None, ...]
# A dtype by its name, such as "bfloat16", or what Keras makes one of (a dtype policy).
DType: TypeAlias = Any
# A decorator that returns a function of the same arguments.
Function = TypeVar("Function", bound=Callable)

Reduction: TypeAlias = Literal[
    "sum_over_batch_size",
    "mean",
    "mean_with_sample_weight",
    "sum",
    "none",
    "token_mean",
    "sequence_mean",
]
DivergenceName: TypeAlias = Literal["forward_kl", "reverse_kl", "jensen_shannon"]
# Batches that a callback acts on.
Batches: TypeAlias = Literal["never", "non_finite", "always"]
