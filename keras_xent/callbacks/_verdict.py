"""Whether a step is no number or a spike, by the values of the steps before: a pure function."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from keras import ops

from keras_xent._types import Tensor

_FEWEST = 10
# A loss that hardly moves has a spread of almost 0.
_SMALLEST_SPREAD = 0.01


class Verdict(NamedTuple):
    """A step's value, the mean and spread of those before (nan where there are too few), and what follows."""

    value: Any
    mean: Any
    spread: Any
    is_not_finite: Any
    is_spike: Any
    is_skipped: Any = False


def judge(
    sums: Tensor, gradients: Sequence[Tensor], before: Tensor, count: Tensor, threshold: float, knows_tokens: bool
) -> tuple[Verdict, Tensor]:
    """Judges a step, and returns the value that later ones are measured by: nan, where there is none.

    Args:
        sums: `[5]`: loss, weighted nll, its weight and the number of valid tokens of the step.
        gradients: of which any may be infinite or NaN.
        before: `[W]` the last values, in any order.
        count: how many there were, which may be more or fewer than `W`.
        threshold: standard deviations above the mean that are a spike.
        knows_tokens: whether the loss has an nll of tokens; a batch without a valid one has no value then.
    """
    loss, nll, weight, num_valid, *_ = ops.unstack(sums, sums.shape[0])
    nll = nll / ops.maximum(weight, 1e-30)
    # Where the nll is finite and the loss is not, it comes from elsewhere: a regularizer, or another output.
    has_nll = ops.logical_and(num_valid > 0, ops.logical_or(ops.isfinite(loss), ops.logical_not(ops.isfinite(nll))))
    value = ops.where(has_nll, nll, loss)
    is_finite = ops.isfinite(value)
    for gradient in gradients:
        is_finite = ops.logical_and(is_finite, ops.all(ops.isfinite(gradient)))
    window = before.shape[0]
    number = ops.minimum(count, window)
    mean, spread = _usual(before, number, enough=number >= min(_FEWEST, window))
    limit = mean + threshold * spread
    # Comparisons with nan are false.
    is_spike = ops.logical_and(is_finite, value > limit)
    is_judged = ops.logical_and(is_finite, ops.logical_or(num_valid > 0, not knows_tokens))
    # One spike is not to hide the next.
    kept = ops.where(is_spike, limit, ops.where(is_judged, value, float("nan")))
    return Verdict(value, mean, spread, ops.logical_not(is_finite), is_spike), kept


def _usual(before, number, enough):
    weights = ops.cast(ops.arange(before.shape[0], dtype="int32") < number, "float32") / ops.cast(
        ops.maximum(number, 1), "float32"
    )
    mean = ops.sum(before * weights)
    spread = ops.sqrt(ops.sum(ops.square(before - mean) * weights))
    spread = ops.maximum(spread, _SMALLEST_SPREAD * ops.abs(mean))
    return ops.where(enough, mean, float("nan")), ops.where(enough, spread, float("nan"))
